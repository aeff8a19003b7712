"""A plan on disk, and what a person asked for: the contract between who plans, who runs, who examines, and live crossings."""
