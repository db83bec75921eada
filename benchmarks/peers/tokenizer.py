"""A tokenizer for the checkpoint of `model.py`, so that servers turn its tokens into text.

    python -m benchmarks.peers.tokenizer DIR

Byte-level, as those of most models: ids 3 to 258 are the bytes, the others are made-up words of one
to three syllables after a space, as many as the vocabulary has. There are no merges, so text is
read byte by byte; the benchmark sends ids.
"""

from __future__ import annotations

import json
import sys
from itertools import islice, product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.peers.model import CONFIG, write_checkpoint

NAMED = ("<pad>", "<s>", "</s>")
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "chat_template": "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
}


def vocabulary() -> dict[str, int]:
    """Returns an id for each token, as the vocabulary of the model has them."""
    syllables = [f"{a}{b}" for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ("".join(parts) for count in (1, 2, 3) for parts in product(syllables, repeat=count))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*NAMED, *letters]
    tokens += [f"Ġ{word}" for word in islice(words, CONFIG["vocab_size"] - len(tokens))]
    return {token: index for index, token in enumerate(tokens)}


def write_served(directory: Path) -> Path:
    """Returns `directory`, after writing checkpoint and tokenizer there."""
    write_checkpoint(directory)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The named tokens are ordinary ones: random weights choose them too, and each should have text.
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=1) + "\n")
    return directory


if __name__ == "__main__":
    print(write_served(Path(sys.argv[1])))
