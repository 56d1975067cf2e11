"""Figures of DistServe (OSDI'24; arXiv 2401.09670) and of its blog."""
