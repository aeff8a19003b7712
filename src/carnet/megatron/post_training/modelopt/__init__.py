"""Specs that ModelOpt works on."""
