"""BERT (arXiv 1810.04805) with fast feedforward networks in place of its FFNs (FastBERT)."""
