"""Evaluation of label maps: metrics of a case, statistics over cases, comparison of models."""
