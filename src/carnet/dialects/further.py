"""What a layer for a further token begins with: one projection of the embedding and of the hidden state, joined in either order."""

EMBED_FIRST = {"mtp.project_embed": "hidden_in", "mtp.project_hidden": "hidden_in"}
HIDDEN_FIRST = dict(reversed(EMBED_FIRST.items()))
