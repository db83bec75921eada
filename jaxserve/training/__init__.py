"""Training of the embedded model: corpus, tokenizer, baseline, optimisation, export."""

from __future__ import annotations
