from pathlib import Path

import numpy as np
import sentencepiece

from data.encoding import encode_document
from data.tokenizer import Tokenizer


def test_a_document_is_bos_text_eos(tokenizer_path: Path, documents: list[str]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    for text in documents[:20]:
        tokens = encode_document(Tokenizer(tokenizer_path), text)
        assert tokens.tolist() == [1, *processor.encode(text), 2]
        assert tokens.dtype == np.dtype("<u2")
