"""The algebra: boxes, strided intervals, and patterns that fold named axes into stored dimensions. It knows no model and no file."""
