"""What layers for further tokens say, computed with modules of transformers': its classes leave such layers out."""

import torch


def logits(model, layer, beyond, tokens):
    """Return the logits of the next token and, but for the last place, those of the one after it.

    ``beyond`` takes the embedding and the hidden state of a place and what attention is given, as a method of ``layer``.
    """
    length = tokens.shape[1] - 1
    future = torch.full((length, length), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        angles = model.model.rotary_emb(hidden, torch.arange(length)[None])
        embedded = model.model.embed_tokens(tokens[:, 1:])
        found = beyond(layer, embedded, hidden[:, :-1], attention_mask=future, position_embeddings=angles)
        return model.lm_head(hidden), model.lm_head(found)
