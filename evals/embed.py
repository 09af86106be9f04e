"""Pictures and texts to embeddings, pictures shared out over the ranks."""

import numpy as np
import torch
from numpy.typing import NDArray

from mmfoundry.data.transforms import EvalTransform
from mmfoundry.evals.samples import Samples
from mmfoundry.evals.task import Clip, gather_rows
from mmfoundry.pipeline.distributed import Runtime

Embeddings = NDArray[np.float32]


@torch.no_grad()
def embed_pictures(clip: Clip, samples: Samples, runtime: Runtime, batch_size: int = 64) -> Embeddings:
    """Embed every picture; each rank reads and encodes its share.

    Args:
        clip: the model under test.
        samples: whose pictures.
        runtime: rank r takes samples r, r + W, r + 2W, ...
        batch_size: pictures a forward pass.

    Returns:
        (n, D), rows L2-normalised, the same on every rank.
    """
    transform = EvalTransform(clip.image_size, clip.resize_mode)
    mine = range(runtime.rank, len(samples), runtime.world_size)
    parts = []
    for start in range(0, len(mine), batch_size):
        rows = mine[start : start + batch_size]
        batch = np.stack([np.asarray(transform(samples.picture(row))) for row in rows])
        parts.append(clip.encode_image(torch.from_numpy(batch)).float())
    width = clip.encode_text([""]).shape[-1]  # a rank without pictures must still know how wide its rows are
    own = torch.cat(parts) if parts else torch.zeros(0, width, device=runtime.device)
    return gather_rows(own, len(samples), runtime).cpu().numpy()


@torch.no_grad()
def embed_texts(clip: Clip, texts: list[str], batch_size: int = 256) -> Embeddings:
    """Embed texts, (n, D) with L2-normalised rows; cheap beside pictures, so every rank does all of them."""
    parts = [clip.encode_text(texts[start : start + batch_size]).float() for start in range(0, len(texts), batch_size)]
    return torch.cat(parts).cpu().numpy()
