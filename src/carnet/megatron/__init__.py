"""What needs megatron-core: its export interface on carnet's layouts, and the specs of post-training that accept old weights."""
