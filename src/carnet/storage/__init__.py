"""The one door to files of checkpoints: nothing else opens, lists, writes or removes one. A store is a module here and a row."""
