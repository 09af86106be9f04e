"""A drawn pool in the form of DataComp's metadata: parquet files, and beside each an npz with embeddings.

Rows are drawn whole columns at a time, ten million in about a minute. Captions are put together from phrases of
several languages, nouns, and codes that hardly ever come twice. The first rows of the first file are edge cases.
"""

from pathlib import Path

import numpy as np
import polars as pl

from mmfoundry.data.filters.subset import SUBSET_TYPE, uids_of

# by language: how captions begin, what they name, how they end; English is drawn for half of them
PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "en": (
        (
            *(
                "a photo of the",
                "Buy cheap",
                "the best",
                "my new",
                "Vintage",
                "two of the",
                "How to draw a",
                "",
                "",
                "The",
            ),
            *(
                "How the",
                "Free shipping on every",
                "top 10",
                "close up of",
                "she and her",
                "from our",
                "SALE!",
                "the",
                "&",
            ),
        ),
        (
            *("dog", "dogs", "bridge", "apple", "Apples", "mountain", "churches", "women", "shoes", "kitchen", "tulip"),
            *(
                "guitar",
                "castle",
                "horse",
                "horses",
                "table",
                "oceans",
                "wedding",
                "sofa",
                "tiger",
                "truck",
                "children",
            ),
            *("online", "today", "nice", "quickly", "with", "because", "very", "yours", "really", "everyone", "again"),
            *(
                "dog,",
                "(bridge)",
                "apple's",
                "#castle",
                "walking",
                "bicycles",
                "knives",
                "better",
                "2019",
                "soon",
                "old",
            ),
        ),
        (
            *(
                "on the beach",
                "in the old town at night",
                "- Free Shipping",
                "| eBay",
                "stock photo",
                "",
                "",
                "for you",
            ),
            *("and more", "vs.", "part 2", "by the river", "...", "for sale in London", "with you and me", "under 20"),
            *("!!", "\u00a0\u00a0new", "x\ny", "🍎🍏"),
        ),
    ),
    "de": (("ein Foto von", "neue", "der beste", "wir haben"), ("Hund", "Brücke", "Haus"), ("am Strand", "im Angebot")),
    "fr": (
        ("une photo de", "acheter le", "les meilleurs"),
        ("chien", "maison", "pont"),
        ("pas cher", "sur la plage", ""),
    ),
    "es": (("una foto de", "comprar", "los mejores"), ("perro", "casa", "puente"), ("en la playa", "barato", "")),
    "it": (("foto del", "la migliore"), ("cane", "casa"), ("sulla spiaggia", "")),
    "nl": (("foto van de", "nieuwe"), ("hond", "brug"), ("op het strand", "")),
    "pl": (("zdjęcie", "najlepszy"), ("pies", "most"), ("na plaży", "")),
    "ru": (("фото", "купить новый", "лучший"), ("собака", "дом", "мост"), ("на пляже", "недорого", "")),
    "ja": (("写真", "新しい", "最高の"), ("犬", "橋"), ("海辺で", "")),
    "zh": (("照片", "购买"), ("狗", "房子"), ("便宜", "")),
    "ar": (("صورة", "أفضل"), ("كلب", "جسر"), ("على الشاطئ", "")),
    "he": (("תמונה של", "קנה"), ("כלב", "בית"), ("על החוף", "")),
}
SIDES = (0, 1, 64, 150, 199, 200, 201, 256, 300, 320, 400, 480, 500, 512, 599, 600, 601, 640, 800, 1024, 1200, 1920)

TEXTS = (
    *(
        None,
        "",
        " ",
        "   ",
        "a",
        "dog",
        "a dog",
        "I am",
        "a b c",
        "a bc d",
        "the big dog",
        "a\nb",
        "\n",
        "\n\n\n\n\n\n",
        "dog\n",
    ),
    *(
        "a\tdog\truns",
        "a\u00a0big\u00a0dog",
        "a\x1cbig\x1ddog",
        "the\x00big\x00dog",
        "\x00\x00 zero bytes here",
        "🍎 🍏 🍎",
    ),
    *("  spaces   around   here  ", "ein Hund läuft am Strand entlang", "これは犬の写真です", "كلب على الشاطئ الجميل"),
    *(
        "\u202eright to left\u202c the dog",
        "THE RED HOUSE ON THE HILL",
        "İstanbul'da bir köpek",
        "the dog ran away " * 2000,
    ),
    *(
        "breathe in, then running",
        "ate the bananas",
        "it was better than nothing",
        "a_b .22 'hood o'clock",
        "12345 67890",
    ),
)


def edge_rows() -> pl.DataFrame:
    """Texts, sizes and scores at which rules turn, in all rows that are worth having."""
    limits = np.float32([0.3, 0.29, 0.28, 0.25])
    scores = [
        *limits,
        *np.nextafter(limits, np.float32(-1)),
        np.float32("nan"),
        None,
        np.float32(-1),
        np.float32("inf"),
    ]
    sizes = [
        (200, 600),
        (200, 601),
        (199, 300),
        (600, 200),
        (0, 0),
        (0, 300),
        (300, 0),
        (None, 300),
        (300, None),
        (400, 400),
    ]
    rows = [(text, 400, 400, 0.3, 0.3) for text in TEXTS]
    # one word to fastText and several to Python, or the other way round; often, since clusters decide as well
    rows += [(text, 400, 400, 0.3, 0.3) for text in ("wedding\u00a0photos", "of\u00a0beautiful", "the\x00wedding") * 12]
    rows += [("the big dog on a beach", width, height, 0.3, 0.3) for width, height in sizes]
    rows += [("the big dog on a beach", 400, 400, b32, l14) for b32 in scores for l14 in scores]
    names = ["text", "original_width", "original_height", "clip_b32_similarity_score", "clip_l14_similarity_score"]
    types = [pl.String, pl.Int64, pl.Int64, pl.Float32, pl.Float32]
    return pl.DataFrame(rows, schema=dict(zip(names, types, strict=True)), orient="row")


def drawn_rows(count: int, seed: int) -> pl.DataFrame:
    """Rows as in a web pool; scores have ties."""
    draw = np.random.default_rng(seed)

    english = draw.random(count) < 0.5
    language = np.where(english, 0, draw.integers(1, len(PHRASES), count))

    def picked(place: int) -> pl.Series:
        lists = [phrases[place] for phrases in PHRASES.values()]
        sizes = np.array([len(one) for one in lists])
        starts = np.cumsum(sizes) - sizes
        return pl.Series([phrase for one in lists for phrase in one])[
            starts[language] + (draw.random(count) * sizes[language]).astype(np.int64)
        ]

    numbers = draw.integers(0, 10**7, count)
    parts = pl.DataFrame([picked(0).alias("a"), picked(1).alias("b"), picked(1).alias("c"), picked(2).alias("e")])
    parts = parts.with_columns(d=pl.Series(numbers), coded=pl.Series(draw.random(count) < 0.3))
    code = pl.when("coded").then(pl.lit(" img-") + pl.col("d").cast(pl.String)).otherwise(pl.lit(""))
    second = pl.when(pl.col("d") % 3 == 0).then(pl.lit("")).otherwise(pl.lit(" ") + pl.col("c"))
    text = parts.select(text=pl.concat_str("a", pl.lit(" "), "b", second, code, pl.lit(" "), "e"))["text"]
    cosine = np.clip(draw.normal(0.22, 0.06, (2, count)), -1, 1).astype(np.float32)
    sides = np.array(SIDES)[draw.integers(0, len(SIDES), (2, count))]
    return pl.DataFrame(
        {
            "text": text,
            "original_width": sides[0],
            "original_height": sides[1],
            "clip_b32_similarity_score": np.round(cosine[0], 3),
            "clip_l14_similarity_score": cosine[1],
        }
    )


def write_pool(
    folder: Path,
    rows: int,
    files: int,
    seed: int = 0,
    width: int = 0,
    edges: bool = True,
    names: tuple[str, ...] = ("b32_img", "b32_txt", "l14_img", "l14_txt"),
    hashes: bool = False,
) -> list[Path]:
    """Write a pool of metadata.

    Args:
        folder: made if it is not there.
        rows: of all files together, edge cases among them.
        files: parquet files; the last is the shortest.
        seed: of everything drawn.
        width: of the embeddings in the npz files; 0 for none.
        edges: whether the first file begins with edge cases.
        names: of the embeddings.
        hashes: whether there is a column "perceptual_hash", which DataComp's metadata has not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    per_file = -(-rows // files)
    return [
        _write_file(
            folder, number, min(per_file, rows - number * per_file), seed, width, edges and number == 0, names, hashes
        )
        for number in range(files)
    ]


def _write_file(
    folder: Path,
    number: int,
    count: int,
    seed: int,
    width: int,
    edges: bool,
    names: tuple[str, ...],
    hashes: bool,
) -> Path:
    draw = np.random.default_rng([seed, number])
    first = edge_rows()[:count] if edges else drawn_rows(0, 0)
    table = pl.concat([first, drawn_rows(count - first.height, int(draw.integers(2**62)))])
    pairs = draw.integers(0, 2**64, (count, 2), np.uint64).view(SUBSET_TYPE)[:, 0]
    uids = uids_of(pairs)
    table = table.select(
        uids.alias("uid"),
        (pl.lit("http://example.org/") + uids).alias("url"),
        *table.columns,
        pl.lit([], pl.List(pl.List(pl.Float64))).alias("face_bboxes"),
        pl.concat([uids, uids.str.reverse()])
        .to_frame()
        .select(pl.col("uid").head(count) + pl.col("uid").tail(count))["uid"]
        .alias("sha256"),
    )
    if hashes:
        found = perceptual_hashes(np.random.default_rng([seed, number, 1]), count)
        table = table.with_columns(perceptual_hash=pl.Series([one.tobytes() for one in found], dtype=pl.Binary))
    path = folder / f"{number:08d}.parquet"
    table.write_parquet(path)
    if width:
        np.savez(path.with_suffix(".npz"), **{name: embeddings(draw, count, width) for name in names})
    return path


def embeddings(draw: np.random.Generator, count: int, width: int) -> np.ndarray:
    """float16 (count, width), of length one, around a few centres."""
    centres = np.random.default_rng(7).normal(size=(12, width))
    points = centres[draw.integers(0, len(centres), count)] + draw.normal(0, 0.5, (count, width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)


def perceptual_hashes(draw: np.random.Generator, count: int) -> np.ndarray:
    """uint8 (count, 64), as of photographs: the finer a frequency, the weaker, and places share colours.

    A tenth are copies, a few bits off, of pictures that are the same in all files: a thousand, some of them far more
    popular than others.
    """
    found = np.concatenate([_hashes_of_pictures(draw, min(20_000, count - i)) for i in range(0, count, 20_000)])
    popular = _hashes_of_pictures(np.random.default_rng(11), 1000)
    copies = np.flatnonzero(draw.random(count) < 0.1)
    which = (1000 ** draw.random(len(copies))).astype(np.int64)  # Zipf's law
    found[copies] = popular[which] ^ np.packbits(draw.random((len(copies), 512), np.float32) < 0.02, axis=1)
    return found


def _hashes_of_pictures(draw: np.random.Generator, count: int) -> np.ndarray:
    """As data/perceptual.py makes them: 256 frequencies above a floor, and chroma against 8 steps at 16 places."""
    frequency = np.hypot(*np.mgrid[:16, :16]).reshape(-1)
    frequency[0] = np.inf
    contrast = np.exp(draw.normal(np.log(300), 0.6, (count, 1)))
    shape = draw.standard_normal((count, 256), np.float32) * (contrast / frequency) > 6
    spread = np.exp(draw.normal(np.log(8), 0.6, (count, 1, 1)))
    chroma = draw.normal(0, 15, (count, 1, 2)) + draw.standard_normal((count, 16, 2), np.float32) * spread
    colour = chroma[..., None] > np.linspace(-40, 40, 8)
    return np.packbits(np.concatenate([shape, colour.reshape(count, 256)], axis=1), axis=1)
