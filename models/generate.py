"""Greedy answers to questions about pictures; what is common to the questions about one picture is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from mmfoundry.models.vlm import VisionLanguageModel
from mmfoundry.models.vlm_text import VlmText


@torch.inference_mode()
def answer(
    model: VisionLanguageModel,
    text: VlmText,
    pictures: Sequence[Tensor],
    questions: Sequence[str],
    picture_of: Sequence[int],
    max_new_tokens: int = 8,
) -> list[str]:
    """Answer questions, each about one picture and on its own.

    Args:
        model: in evaluation mode.
        text: its text side.
        pictures: the tiles of each, (n, 3, side, side) uint8.
        questions: as many as answers are wanted.
        picture_of: which of `pictures` each question is about.
        max_new_tokens: an answer is cut off here.

    Returns:
        The answers, in the order of the questions.
    """
    answers = [""] * len(questions)
    # Prefixes of one length need no padding; pictures differ in their number of tiles only where tiling adapts.
    for count in sorted({len(tiles) for tiles in pictures}):
        asked = [row for row, picture in enumerate(picture_of) if len(pictures[picture]) == count]
        if not asked:
            continue
        used = sorted({picture_of[row] for row in asked})
        place = {picture: position for position, picture in enumerate(used)}
        prompts = [text.prompt(questions[row], count) for row in asked]
        cache = _read_pictures(model, prompts[0][0], torch.stack([pictures[picture] for picture in used]))
        cache.batch_select_indices(torch.tensor([place[picture_of[row]] for row in asked], device=model.device))
        ends = [end for _, end in prompts]
        generated = _go_on(model, text, cache, len(prompts[0][0]), ends, max_new_tokens)
        for row, ids in zip(asked, generated, strict=True):
            answers[row] = text.decode(ids)
    return answers


def _read_pictures(model: VisionLanguageModel, prefix: list[int], tiles: Tensor) -> DynamicCache:
    """Keys and values of the common start of every question, one row a picture."""
    cache = DynamicCache(config=model.model.language_model.config)
    ids = torch.tensor(prefix, device=model.device).expand(len(tiles), -1)
    embedded = model.embed(ids, tiles.flatten(0, 1).to(model.device))
    model.model.language_model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
    return cache


def _go_on(
    model: VisionLanguageModel, text: VlmText, cache: DynamicCache, start: int, ends: list[list[int]], limit: int
) -> list[list[int]]:
    """Read each question after its picture, then write greedily until every answer has ended."""
    device, longest = model.device, max(map(len, ends))
    pad = [longest - len(end) for end in ends]  # on the left, so that all answers start in one column
    ids = torch.tensor([[text.end_id] * space + end for space, end in zip(pad, ends, strict=True)], device=device)
    space = torch.tensor(pad, device=device)[:, None]
    columns = torch.arange(longest, device=device)
    seen = torch.cat([torch.ones(len(ends), start, dtype=torch.long, device=device), (columns >= space).long()], dim=1)
    position = start + (columns - space).clamp(min=0)
    written: list[Tensor] = []
    running = torch.ones(len(ends), dtype=torch.bool, device=device)
    for step in range(limit):
        hidden = model.model.language_model(
            inputs_embeds=model.embed(ids, None),
            attention_mask=seen,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        chosen = model.lm_head(hidden[:, -1]).argmax(-1)
        chosen = torch.where(running, chosen, text.end_id)
        written.append(chosen)
        running = running & (chosen != text.end_id)
        if step + 1 == limit or not running.any():
            break
        ids = chosen[:, None]
        position = position[:, -1:] + 1
        seen = torch.cat([seen, seen.new_ones(len(ends), 1)], dim=1)
    rows = torch.stack(written, dim=1).tolist()
    return [row[: row.index(text.end_id)] if text.end_id in row else row for row in rows]
