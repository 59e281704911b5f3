"""Generate the sentences of a search, with transformers or vLLM."""
