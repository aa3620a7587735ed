"""Pseudo labels by the consensus of several models, and rounds of training that grow the labeled set."""
