"""Log probabilities tell each token's true bytes: joined they are the text's,
for every kind of tokenizer.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from ktk.generate.sampling import Token
from ktk.generate.text import Detokenizer
from ktk.integration.transformers.tokens import Spelling
from ktk.server.answer import CompletionLogprobs, chat_logprobs
from make.serving import TEXT

SENTENCES = [*TEXT, "  two spaces, then 東京 and 𝛼𝛽\n\nend. ", "naïve café", "人"]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def byte_fallback() -> Tokenizer:
    """As SentencePiece's BPE in Llama and Mistral."""
    bytes_ = {f"<0x{b:02X}>": b + 1 for b in range(256)}
    letters = sorted(set("".join(TEXT[:2])) - {" ", "\n"} | {"▁"})
    vocabulary = {"<unk>": 0, **bytes_, **{c: 257 + i for i, c in enumerate(letters)}}
    vocabulary["▁t"] = len(vocabulary)
    made = Tokenizer(
        models.BPE(vocabulary, [("▁", "t")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def unigram() -> Tokenizer:
    """As SentencePiece's Unigram in T5."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    made.train_from_iterator([*SENTENCES, *TEXT], trainer)
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        [*SENTENCES, *TEXT],
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False),
    )
    return made


KINDS = {f.__name__: f for f in (byte_level, byte_fallback, unigram, word_piece)}


def wrapped(kind: str) -> Any:
    own = KINDS[kind]()
    made = PreTrainedTokenizerFast(tokenizer_object=own, clean_up_tokenization_spaces=False)
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_joined_bytes_are_the_texts(kind: str) -> None:
    tokenizer = wrapped(kind)
    spelling = Spelling(tokenizer)
    for sentence in [*SENTENCES, "a <think> b"]:
        ids = tokenizer(sentence)["input_ids"]
        text = Detokenizer(tokenizer)
        want = "".join(text.add(i) for i in ids) + text.finish()
        tokens = [Token(i, -1.0) for i in ids]
        entries = chat_logprobs(spelling, tokens[:1], True) + chat_logprobs(
            spelling, tokens[1:], False
        )
        assert bytes(b for e in entries for b in e["bytes"]).decode() == want
        assert all(
            e["token"].encode() == bytes(e["bytes"]) or e["token"].startswith("bytes:")
            for e in entries
        )
        plain = CompletionLogprobs(spelling)
        offsets = [o for t in tokens for o in plain.of([t])["text_offset"]]
        assert offsets == CompletionLogprobs(spelling).of(tokens)["text_offset"]
        assert offsets == sorted(offsets) and offsets[-1] < len(want)


def test_parts_of_characters_have_their_bytes() -> None:
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = wrapped(kind)
        ids = [i for i in tokenizer("人")["input_ids"] if tokenizer.convert_ids_to_tokens(i) != "▁"]
        entries = chat_logprobs(Spelling(tokenizer), [Token(i, -1.0) for i in ids], False)
        assert [e["bytes"] for e in entries] == [[0xE4], [0xBA], [0xBA]]
        assert [e["token"] for e in entries] == ["bytes:\\xe4", "bytes:\\xba", "bytes:\\xba"]


def test_tokens_of_one_text_stay_apart() -> None:
    tokenizer = wrapped("byte_fallback")
    letter, byte = tokenizer.convert_tokens_to_ids(["t", "<0x74>"])
    token = Token(letter, -0.1, ((letter, -0.1), (byte, -2.5)))
    made = CompletionLogprobs(Spelling(tokenizer)).of([token])
    assert made["top_logprobs"] == [{"t": -0.1, f"token_id:{byte}": -2.5}]
    assert len(chat_logprobs(Spelling(tokenizer), [token], True)[0]["top_logprobs"]) == 2


def test_rows_without_a_token_and_added_tokens() -> None:
    tokenizer = wrapped("byte_level")
    spelling = Spelling(tokenizer)
    assert spelling.bytes_of(len(tokenizer) + 5, False) == b""
    assert spelling.bytes_of(tokenizer.convert_tokens_to_ids("<think>"), False) == b"<think>"
