"""models/aligner.py: the connector learns names, and nothing else moves; uneven ranks count tiles alike."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mmfoundry.models.aligner import Aligner, AlignmentLoss, AlignOutput, name_vectors
from mmfoundry.pipeline.distributed import rank_in
from tests.models.tiny_vlm import tiny_vlm
from tests.ranks import run_ranks


def random_output(tiles: int = 7, tokens: int = 3, names: int = 5, width: int = 8) -> AlignOutput:
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(*shape, generator=generator) for shape in ((tiles, tokens, width), (names, width))]
    return AlignOutput(normal[0], torch.arange(tiles) % names, normal[1] + 2)


def test_loss_by_hand() -> None:
    output = random_output()
    found = AlignmentLoss(temperature=0.1, distance_weight=0.5)(output, {})
    centre = output.names_CD.mean(0)
    variance = (output.names_CD - centre).square().sum() / 5
    choice, distance, right = [], [], 0
    for tile, target in zip(output.tokens_ntD, output.target_n.tolist(), strict=True):
        scores = torch.stack(
            [
                torch.stack([F.cosine_similarity(t - centre, name - centre, dim=0) for name in output.names_CD]) / 0.1
                for t in tile
            ]
        )
        choice += [-row.log_softmax(0)[target] for row in scores]
        distance += [(t - output.names_CD[target]).square().sum() / variance for t in tile]
        right += int(scores.mean(0).argmax() == target)
    torch.testing.assert_close(found["distance"], torch.stack(distance).mean())
    torch.testing.assert_close(found["loss"], torch.stack(choice).mean() + 0.5 * found["distance"])
    torch.testing.assert_close(found["accuracy"], torch.tensor(right / 7))


def test_perfect_and_ignorant_tokens() -> None:
    output = random_output()
    perfect = AlignOutput(output.names_CD[output.target_n][:, None], output.target_n, output.names_CD)
    values = AlignmentLoss()(perfect, {})
    assert (values["accuracy"], values["distance"]) == (1, 0)
    mean = output.names_CD.mean(0).expand(5, 1, -1)
    torch.testing.assert_close(
        AlignmentLoss()(AlignOutput(mean, torch.arange(5), output.names_CD), {})["distance"], torch.tensor(1.0)
    )


def test_only_the_connector_learns() -> None:
    model, text = tiny_vlm()
    ids = [text.encode(f" {name}")[0] for name in ("dog", "apple", "nothing")]
    names = name_vectors(model, ids)
    torch.testing.assert_close(names[0], model.model.language_model.embed_tokens.weight[torch.tensor(ids[0])].mean(0))
    aligner = Aligner(model, names)
    tiles = (torch.eye(3) * 255).to(torch.uint8)[..., None, None].expand(-1, -1, 16, 16)  # red, green, blue
    batch = {"tiles": tiles, "target": torch.arange(3)}
    optimizer = torch.optim.AdamW([w for w in aligner.parameters() if w.requires_grad], 1e-2)
    assert {n for n, w in aligner.named_parameters() if w.requires_grad} == {
        f"vlm.model.multi_modal_projector.{name}" for name, _ in model.model.multi_modal_projector.named_parameters()
    }
    start = AlignmentLoss()(aligner(batch), batch)
    for _ in range(60):
        values = AlignmentLoss()(aligner(batch), batch)
        values["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert values["accuracy"] == 1
    assert values["distance"] < 0.5 * start["distance"]


def loss_and_gradient(group: ProcessGroup | None, bounds: list[tuple[int, int]]) -> list[Tensor]:
    output = random_output()
    first, last = bounds[rank_in(group)]
    tokens = output.tokens_ntD.double()[first:last].requires_grad_()
    part = AlignOutput(tokens, output.target_n[first:last], output.names_CD.double())
    values = AlignmentLoss()(part, {}, group)
    gradient = torch.zeros_like(output.tokens_ntD, dtype=torch.float64)
    gradient[first:last] = torch.autograd.grad(values["loss"], tokens)[0]
    return [values["loss"].detach(), values["accuracy"].double(), values["distance"], gradient]


def test_ranks_with_unequal_shares_agree_with_one_process() -> None:
    expected = loss_and_gradient(None, [(0, 7)])
    per_rank = run_ranks(loss_and_gradient, 2, [(0, 2), (2, 7)])
    for part, values in zip(expected, zip(*per_rank, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(values).mean(0), part, rtol=1e-6, atol=1e-9)
