"""What a notebook shows: cards, tokens, attention. Each has a text and, in a notebook, HTML.

    llm                                         # a card: architecture, memory, devices
    llm.score("def area(width, height):")       # tokens coloured by their log-probability
    llm.view_tokens(llm.generate("import ", logprobs=3))
    llm.view_attention("import os", layer=2)

None shows the numbers of weights.
"""

from jaxserve.notebook.activations import Activations
from jaxserve.notebook.attention import AttentionView
from jaxserve.notebook.card import Card
from jaxserve.notebook.tokens import Score, TokenView

__all__ = ["Activations", "AttentionView", "Card", "Score", "TokenView"]
