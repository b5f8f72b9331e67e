"""Crammed BERT (arXiv 2212.14034) with fast feedforward networks: the architecture of UltraFastBERT (arXiv 2311.10770)."""
