"""What every program joins of a Mamba-2 mixer, in the same order: the rows of one projection, the channels of one convolution."""

IN_PROJ = {
    "mamba.z": "group head wide",
    "mamba.x": "group head wide",
    "mamba.b": "group state",
    "mamba.c": "group state",
    "mamba.dt": "group head",
}
CONV = {"mamba.conv_x": "group head wide", "mamba.conv_b": "group state", "mamba.conv_c": "group state"}
CONV_BIAS = {f"{name}_bias": axes for name, axes in CONV.items()}
