"""Questions to a model in its own chat template, and the tokens that end its turn."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping

from tokenizers import AddedToken, Tokenizer

# Control tokens that end a turn, whatever the file says of them.
END_OF_TURN = (
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("</s>", "<eos>"),
)
FIRST_PRIVATE, LAST_PRIVATE = 0xF0000, 0xFFFFD  # code points without a meaning of their own


@dataclasses.dataclass(frozen=True)
class Chat:
    """What it takes to talk with a model.

    Attributes:
      where: the file that says so, for errors.
      tokenizer: of the model.
      template: Jinja source of its prompts; None for a model without.
      tokens: names that the template knows, such as "bos_token", and their text.
      end_ids: ids that end a turn.
    """

    where: str
    tokenizer: Tokenizer
    template: str | None
    tokens: Mapping[str, str]
    end_ids: tuple[int, ...]


def end_ids(tokenizer: Tokenizer, named: list[int]) -> tuple[int, ...]:
    """The ids that a checkpoint names and those of its control tokens that end a turn by their text."""
    control = {token.content: i for i, token in _control(tokenizer).items()}
    return tuple(sorted({*named, *(control[text] for text in END_OF_TURN if text in control)}))


def chat_prompt(chat: Chat, question: str, text: str = "") -> list[int]:
    """Token ids of a question, about a text or not, up to where the answer begins.

    A model without a template gets the text and the question as they stand. Control tokens in either are
    characters, not tokens: nobody ends the turn or speaks as another from within a text.

    Args:
      chat: of the model.
      question: the user's.
      text: what it is about; empty for nothing.

    Raises:
      ValueError: the template fails, or leaves the question out.
    """
    content = f"{text}\n\n{question}" if text else question
    control = {token.content: i for i, token in _control(chat.tokenizer).items()}
    hidden = _Hidden(content, [x for x in control if x in content], chat.template or "")
    if chat.template is None:
        return _encoded(chat.tokenizer, hidden, hidden.text, control, with_ends=True)
    from experiments.models import chat_template  # Jinja is for those who chat

    prompt = chat_template.render(
        chat.template, [{"role": "user", "content": hidden.text}], chat.tokens, chat.where
    )
    if hidden.text.strip() not in prompt:
        raise ValueError(f"the chat template in {chat.where} does not give the question as it is")
    return _encoded(chat.tokenizer, hidden, prompt, control, with_ends=False)


def next_turn(chat: Chat, question: str) -> list[int]:
    """Token ids from the end of an answer up to where the next one begins.

    The first of them end the answer's turn: who has that token from the model leaves it out.

    Args:
      chat: of the model.
      question: the user's next one.

    Raises:
      ValueError: the template fails, or leaves the answer or the question out.
    """
    control = {token.content: i for i, token in _control(chat.tokenizer).items()}
    hidden = _Hidden(question, [x for x in control if x in question], chat.template or "")
    if chat.template is None:
        return _encoded(chat.tokenizer, hidden, f"\n\n{hidden.text}", control, with_ends=False)
    from experiments.models import chat_template  # Jinja is for those who chat

    answer = hidden.next_free()
    said = [("user", "?"), ("assistant", answer), ("user", hidden.text)]
    messages = [{"role": role, "content": content} for role, content in said]
    prompt = chat_template.render(chat.template, messages, chat.tokens, chat.where)
    _, found, rest = prompt.partition(answer)
    if not found or hidden.text.strip() not in rest:
        raise ValueError(f"the chat template in {chat.where} does not give a chat as it is")
    return _encoded(chat.tokenizer, hidden, rest, control, with_ends=False)


class _Hidden:
    """A user's text with a private character in the place of each control token in it."""

    def __init__(self, text: str, found: list[str], template: str) -> None:
        self._free = _private_characters(text + template)
        self.original = dict(zip(self._free, sorted(found, key=len, reverse=True), strict=False))
        self.text = text
        for character, token in self.original.items():
            self.text = self.text.replace(token, character)

    def shown(self, text: str) -> str:
        """Text with the user's own in the place again."""
        for character, token in self.original.items():
            text = text.replace(character, token)
        return text

    def next_free(self) -> str:
        """A character that occurs nowhere."""
        return next(self._free)


def _private_characters(text: str) -> Iterator[str]:
    taken = set(text)
    return (c for c in map(chr, range(FIRST_PRIVATE, LAST_PRIVATE)) if c not in taken)


def _control(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    return {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _encoded(
    tokenizer: Tokenizer, hidden: _Hidden, prompt: str, control: dict[str, int], *, with_ends: bool
) -> list[int]:
    """Ids of a prompt whose control tokens are the template's."""
    if hidden.original:
        # The tokenizer is told other names of the template's tokens: the user's are then ordinary text.
        present = sorted((x for x in control if x in prompt), key=len, reverse=True)
        renamed = {token: hidden.next_free() for token in present}
        if present:
            parts = re.compile("|".join(map(re.escape, present)))
            prompt = parts.sub(lambda match: renamed[match.group()], prompt)
        tokenizer = _with_names(tokenizer, renamed)
        prompt = hidden.shown(prompt)
    return tokenizer.encode(prompt, add_special_tokens=with_ends).ids


def _with_names(tokenizer: Tokenizer, renamed: Mapping[str, str]) -> Tokenizer:
    """A tokenizer whose control tokens have new names, those without one a name that nobody writes."""
    raw = json.loads(tokenizer.to_str())
    names = {
        token["content"]: renamed.get(token["content"], f"{chr(LAST_PRIVATE)}{token['id']}")
        for token in raw["added_tokens"]
        if token["special"]
    }
    for token in raw["added_tokens"]:
        if token["special"]:
            token |= {"content": names[token["content"]], "normalized": False}
    model = raw["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [x for x in model["merges"] if "".join(x).replace(" ", "") not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return Tokenizer.from_str(json.dumps(raw))
