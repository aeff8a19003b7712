"""What a person reads and what a machine reads of a checkpoint, a plan and a verdict."""
