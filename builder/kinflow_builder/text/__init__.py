"""A Llama-style language model as a family: cut into segments, with trained branches, as a bundle that drafts."""
