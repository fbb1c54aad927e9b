"""Objects called by words: the loss by hand, what tokens show of it, the pre-training's words, and that colours are learned from text."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_fused_generator import GENERATOR
from test_step import built
from tiny import tiny_config

from grex_mllm.data.synthetic.export import export
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.instance_selection.criterion import word_terms
from grex_mllm.models.generators.region_tokens.words import called_by, embeddings, with_words, word_loss
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.word_bags import SMOOTHING, WordList, bag_loss, places_of
from grex_mllm.training import word_choice
from grex_mllm.training.combinations import check_combinations
from grex_mllm.training.pretraining import word_tokens
from grex_mllm.training.run import train_from_config
from grex_mllm.training.step import Step


def test_the_loss_by_hand() -> None:
    """Two images of two objects, three words; an expression of both objects, one of one, and one of none, which does not count."""
    known = torch.tensor([[[0.0, 1.0, 0.5], [2.0, 0.0, 0.0]], [[0.3, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    logits = known.clone().requires_grad_()
    index = torch.tensor([0, 1, 1])
    member = torch.tensor([[True, True], [True, False], [False, False]])
    ids, real = torch.tensor([[1, 0], [2, 1], [0, 0]]), torch.tensor([[True, True], [True, False], [True, True]])
    got = bag_loss(logits, index, member, ids, real)
    often = [1.0, 1.0, 1.0]  # words 1 and 0 of the first expression, word 2 of the second

    def chance(image: int, item: int, word: int) -> float:
        weights = [math.exp(float(value)) * count for value, count in zip(known[image, item], often, strict=True)]
        return weights[word] / sum(weights)

    first = [(chance(0, 0, word) + chance(0, 1, word)) / 2 for word in (1, 0)]
    assert got.item() == pytest.approx(-(math.log(first[0]) + math.log(first[1]) + math.log(chance(1, 0, 2))) / 3, rel=1e-5)
    got.backward()
    assert logits.grad is not None and not logits.grad[1, 1].any() and logits.grad[0].any()


def test_words_that_come_often_are_no_news() -> None:
    """With logits of zero each word is as likely as it comes in the batch: the loss is the entropy of the batch's words."""
    ids = torch.tensor([[0, 0, 0, 1]])
    got = bag_loss(torch.zeros(1, 1, 5), torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool), ids, ids >= 0)
    total = 4 + 3 * SMOOTHING
    assert got.item() == pytest.approx(-(3 * math.log(3 / total) + math.log(1 / total)) / 4, rel=1e-5)


def test_a_batch_without_any_target_gives_zero_with_gradients() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss = bag_loss(logits, torch.tensor([0, 1]), nothing, torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


def test_what_is_said_of_all_objects_stands_for_none() -> None:
    """ "the" of both, "red" of the first, "star" of the second twice: the first is called red, the second star."""
    counts = torch.tensor([[[2.0, 1.0, 0.0], [2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]])
    shares = called_by(counts)
    red, star = math.log((1 / 3) / (1 / 7)), 2 * math.log((2 / 4) / (2 / 7))
    the = 2 * math.log((2 / 3) / (4 / 7))
    torch.testing.assert_close(shares[0, 0], torch.tensor([the, red, 0.0]) / (the + red))
    torch.testing.assert_close(shares[0, 1], torch.tensor([0.0, 0.0, star]) / star)
    assert not shares[0, 2].any()


def test_tokens_show_their_words_and_nobody_elses(tmp_path: Path) -> None:
    model, batches = built("words", tmp_path)
    batch, generator = batches.at(0), model.generator.eval()
    maps = model.grounding.language_free(model.grounding.encode_image(batch.image, batch.input_sizes))
    drawn: dict[str, Any] = {"valid_sizes": torch.tensor(batch.input_sizes), "instance_boxes_norm": batch.instance_boxes_norm}
    part = batch.generation
    objects = generator.objects(maps, batch.instance_masks, drawn["valid_sizes"], batch.instance_boxes_norm)
    assert objects.word_logits is not None and objects.words is not None
    table = embeddings(generator.lm, torch.arange(280))
    torch.testing.assert_close(objects.words, objects.word_logits.softmax(-1) @ table)
    counts = [len(m) for m in batch.instance_masks]
    before = generator.arrange(objects, counts, part.image_index, part.target_index)
    image = int(part.image_index[0])
    objects.words = objects.words.clone()
    objects.words[image, part.target_index[0][0]] += 1.0 * torch.randn(table.shape[1])
    after = generator.arrange(objects, counts, part.image_index, part.target_index)
    moved = (after.embeds - before.embeds).abs().amax(-1) > 1e-6
    same_image = part.image_index == image
    assert moved[0].sum() == 1 and moved[same_image].any(1).all() and not moved[~same_image].any()
    meant = torch.tensor(
        [i and part.target_index[0][0].item() in t.tolist() for i, t in zip(same_image.tolist(), part.target_index, strict=True)]
    )
    assert torch.equal((after.summary - before.summary).abs().amax(-1) > 1e-6, meant)


def test_only_listed_words_count(tmp_path: Path) -> None:
    model, batches = built("words", tmp_path)
    part, lm = batches.at(0).generation, model.generator.lm
    objects = SimpleNamespace(queries=torch.randn(4, 12, 16), tokens=torch.zeros(4, 12, 16), word_logits=None, words=None, kind_logits=None)
    said = part.lm_ids[:, 1:].unique()
    listed = said[::2]  # every second id that occurs
    with_words(objects, lm, listed)  # type: ignore[arg-type]
    assert objects.word_logits.shape == (4, 12, len(listed))
    eos = model.generator.tokenizer.eos_id
    ids = part.lm_ids.clone()
    loss = word_loss(objects, part, listed, eos)  # type: ignore[arg-type]
    ids[:, 1:][~torch.isin(ids[:, 1:], listed)] = 298
    assert not torch.isin(torch.tensor(298), listed) and (ids != part.lm_ids).any()
    assert word_loss(objects, part._replace(lm_ids=ids), listed, eos) == loss  # type: ignore[arg-type]
    ids[0, 2] = listed[(listed != ids[0, 2]) & (listed != eos)][0]
    assert word_loss(objects, part._replace(lm_ids=ids), listed, eos) != loss  # type: ignore[arg-type]
    with pytest.raises(GrexError, match=r"model\.generator\.words is 999; expected 0 to \d+"):
        built("generate", tmp_path / "more", model__generator__words=999)


def test_a_list_takes_what_is_said_most() -> None:
    words = WordList(3)
    assert words.ids.tolist() == [0, 1, 2]
    words.choose(torch.tensor([0, 5, 2, 0, 9, 2]))
    assert words.ids.tolist() == [1, 2, 4]  # of equals the first
    words.choose(torch.tensor([0, 0, 0, 0, 7, 0]))
    assert words.ids.tolist() == [0, 1, 4]
    places, known = places_of(torch.tensor([[4, 0], [3, 9]]), words.ids)
    assert places.tolist() == [[2, 0], [2, 2]] and known.tolist() == [[True, True], [False, False]]


def test_a_training_chooses_its_words_from_its_data_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part by its own tokenizer, regions by what is read, objects by what is written; a training that starts from it keeps them."""
    monkeypatch.setattr(word_choice, "CHUNK", 7)  # several chunks
    texts: dict[str, list[list[str]]] = {}
    for name, images in (("first", 4), ("second", 8)):
        export(SyntheticConfig(image_size=64), "train", images, tmp_path / name, 4)
        lines = [json.loads(line) for line in (tmp_path / name / "expressions.jsonl").read_text(encoding="utf-8").splitlines()]
        (tmp_path / name / "expressions.jsonl").write_text(
            "".join(json.dumps({**line, "raw": line["raw"].replace("the", "that")}) + "\n" for line in lines), encoding="utf-8"
        )
        texts[name] = [[line["raw"].replace("the", "that") for line in lines], [line["expression"] for line in lines]]

    def train(name: str, **changes: object) -> GrexModel:
        fields: dict[str, Any] = {"data__train": tmp_path / name, "model__decoder__words": 30, "model__generator__words": 20,
                                  "train__steps": 1, "train__batch_images": 2, "train__out": tmp_path / f"{name}_model"}  # fmt: skip
        train_from_config(tiny_config(**GENERATOR, **fields, **changes))
        return GrexModel.from_pretrained(tmp_path / f"{name}_model")

    first = train("first")
    parts = [first.grounding.decoder.image_part.words.ids, first.generator.words.ids]
    readers = [lambda line: first.text_tokenizer.encode([line], 32)[0][0], lambda line: first.generator.tokenizer.encode([line])[0][0]]
    for listed, encode, number, lines in zip(parts, readers, (30, 20), texts["first"], strict=True):
        counts = Counter(token for line in lines for token in encode(line).tolist() if token)
        rarest = min(counts[token] for token in listed.tolist())
        assert len(listed) == number and listed.tolist() != list(range(number)) and rarest > 0
        assert all(count <= rarest for token, count in counts.items() if token not in listed.tolist())
    assert texts["first"] != texts["second"]
    second = train("second", train__start=tmp_path / "first_model")
    assert torch.equal(second.grounding.decoder.image_part.words.ids, parts[0]) and torch.equal(second.generator.words.ids, parts[1])


def test_the_pre_training_shows_what_expressions_say(tmp_path: Path) -> None:
    """The words of each object are those of the expressions that mean it, an expression's shared by its targets; nobody's show nothing."""
    model, batches = built("words", tmp_path)
    batch, generator = batches.at(0), model.generator
    objects = word_tokens(generator, batch)
    counts = torch.zeros(*objects.tokens.shape[:2], 280)
    for image, targets, text in zip(batch.image_index.tolist(), batch.target_index, batch.expressions, strict=True):
        for word in generator.tokenizer.encode([text])[0][0, 1:-1].tolist():
            if word < 280:
                counts[image, targets, word] += 1.0 / max(1, len(targets))
    assert (counts.sum(-1) > 0).any() and not (counts.sum(-1) > 0).all()
    torch.testing.assert_close(objects.words, called_by(counts) @ embeddings(generator.lm, torch.arange(280)))


def test_language_reads_the_words_of_regions(tmp_path: Path) -> None:
    """Other words of a region are another answer, though its own feature, box and mask stay."""
    model, batches = built("words", tmp_path)
    batch, grounding = batches.at(0), model.grounding.eval()
    part = grounding.decoder.image_part

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return grounding(batch.image, batch.image_index, batch.text_ids, batch.text_mask, batch.input_sizes).no_target_logits

    before = answer()
    with torch.no_grad():
        part.word.weight.copy_(part.word.weight.flip(0))
    assert (answer() - before).abs().max() > 1e-6


def test_what_cannot_be_is_refused() -> None:
    for number in (-1, 301):
        with pytest.raises(GrexError, match=rf"model\.decoder\.words is {number}; expected 0 to 300"):
            check_combinations(tiny_config(model__decoder__words=number))


def test_regions_learn_words_from_their_targets_alone(tmp_path: Path) -> None:
    model, batches = built("words", tmp_path)
    batch, step = batches.at(0), Step(model, model.config).train()
    terms = step(batch, 1.0)
    assert terms["ground/words"] > 0 and terms["generate/words"] > 0
    model.zero_grad()
    terms["ground/words"].backward()
    part = model.grounding.decoder.image_part
    assert part.word.weight.grad.any() and not [p for p in model.grounding.text.parameters() if p.grad is not None and p.grad.any()]


def test_regions_learn_no_word_that_is_not_listed(tmp_path: Path) -> None:
    """Another token in the place of one that is no word changes nothing of the loss; one in the place of a word does."""
    model, batches = built("words", tmp_path)
    batch, grounding = batches.at(0), model.grounding
    said = batch.text_ids[batch.text_mask.bool()].unique()
    words = grounding.decoder.image_part.words
    listed = torch.cat([said[::2], torch.arange(301, 301 + len(words.ids) - len(said[::2]))])  # every second token that occurs
    words.ids.copy_(listed)
    with torch.no_grad():
        out = grounding.train()(batch.image, batch.image_index, batch.text_ids, batch.text_mask, batch.input_sizes)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        owner = torch.arange(out.extra.regions.word_logits.shape[1]).expand(len(batch.image), -1)
        return word_terms(out.extra.regions, replace(batch, text_ids=ids), owner)["words"]

    other = torch.where(torch.isin(batch.text_ids, listed), batch.text_ids, said[1])
    assert not torch.equal(other, batch.text_ids) and said[1] not in listed and loss(other) == loss(batch.text_ids) > 0
    frequent = batch.text_ids[torch.isin(batch.text_ids, listed) & (batch.text_mask > 0)].mode().values
    unlisted = torch.where(batch.text_ids == frequent, said[1], batch.text_ids)
    assert loss(unlisted) != loss(batch.text_ids)


def test_words_are_learned_from_the_beginning(tmp_path: Path) -> None:
    """Before the expressions are learned, too, and from all of them: in evaluation mode the loss is the same early and late."""
    model, batches = built("words", tmp_path, loss__generate_start=0.5)
    batch, step = batches.at(0), Step(model, model.config).eval()
    early, late = step(batch, 0.0), step(batch, 1.0)
    assert "generate/lm" not in early and early["generate/words"] > 0
    torch.testing.assert_close(early["generate/words"], late["generate/words"])
    early["generate/total"].backward()
    assert model.generator.region_tokens.word_query.weight.grad.any()


def test_neither_part_has_words_unless_asked_for(tmp_path: Path) -> None:
    without, (with_them, _) = built("generate", tmp_path)[0], built("words", tmp_path / "words")
    regions, tokens = "grounding.decoder.image_part", "generator.region_tokens"
    new = {f"{regions}.word", f"{regions}.words", f"{regions}.called", "generator.words", f"{tokens}.word_query", f"{tokens}.word_norm"}
    assert {name.rpartition(".")[0] for name in with_them.saved_state().keys() ^ without.saved_state().keys()} == new
    with_them.save_pretrained(tmp_path / "model")
    again = GrexModel.from_pretrained(tmp_path / "model")
    assert again.config.model.decoder.words == 250 and again.config.model.generator.words == 280


def test_colours_are_learned_from_expressions_alone() -> None:
    """Three objects of three colours, two expressions each for pairs of them and for one: the words fall to the right objects."""
    torch.manual_seed(0)
    red, green, blue, the = range(4)
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    sets = [([0], [the, red]), ([1, 2], [green, blue]), ([0, 1], [the, red, green]), ([2], [the, blue])]
    member, ids, real = torch.zeros(4, 3, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.bool)
    for row, (targets, words) in enumerate(sets):
        member[row, targets] = True
        ids[row, : len(words)], real[row, : len(words)] = torch.tensor(words), True
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        bag_loss(logits, torch.zeros(4, dtype=torch.int64), member, ids, real).backward()
        optimizer.step()
    assert logits[0, :, :3].argmax(-1).tolist() == [red, green, blue]
