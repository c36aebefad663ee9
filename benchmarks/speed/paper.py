"""What the paper states of the time per token (arXiv 2508.09874): its ratios to the base."""

REGIME = "the paper: teacher-forced tokens; GPU, batch and context not stated"
# Time per token of Qwen2.5-1.5B + 0.5B, in units of the base's.
RATIOS = {"base + memory": 1.28, "RAG (BM25), every 4 tokens": 1.51, "kNN-LM": 2.17}
