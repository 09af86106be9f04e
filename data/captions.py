"""English captions for one pictured thing, from its names, category and the picture's background; and bad captions.

Every function draws from the generator that it is given, so that captions are a function of the seed alone.
"""

import numpy as np

from mmfoundry.data.concepts import Concept, indefinite, with_article

# {thing}: noun phrase of a name or synonym; {word}: last word of the name; {kind}: its kind; {colour}: background
GOOD = (
    "a picture of {thing}",
    "a picture of {thing} on {a_colour} background",
    "{thing} in front of a plain {colour} background",
    "a small drawing of {thing}",
    "this picture shows {thing}, filed under {kind}",
    "a colourful icon of {thing} for your website",
    "an emoji that shows {thing}",
    "clip art with {thing} against {a_colour} background",
    "the picture shows only {thing} and nothing else",
    "a simple cartoon of {thing} to download for free",
    "{kind} pictures: {thing} for you to print",
    "here you can see {thing} in the {where} of the picture",
    "a sticker with {thing}, drawn in a flat style",
    "an illustration of {thing} on {colour} paper",
)
SHORT = ("{word}", "IMG", "{word}!", "pic", "DSC", "the {word}", "photo", "no title", "new")

# Sentences long enough for a language identifier, with words for things that we know in that language.
OTHER_LANGUAGES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "de": (
        (
            "Auf diesem Bild ist {word} vor einem einfarbigen Hintergrund zu sehen",
            "Eine kleine Zeichnung zeigt {word} in leuchtenden Farben",
            "Hier sieht man {word}, gezeichnet für eine Webseite mit kostenlosen Bildern",
        ),
        {
            "dog": "einen Hund",
            "apple": "einen Apfel",
            "house": "ein Haus",
            "tree": "einen Baum",
            "key": "einen Schlüssel",
            "snail": "eine Schnecke",
            "strawberry": "eine Erdbeere",
        },
    ),
    "fr": (
        (
            "Cette image montre {word} devant un fond de couleur unie",
            "Un petit dessin de {word} que vous pouvez télécharger gratuitement",
            "On voit ici {word}, une illustration aux couleurs vives pour votre site",
        ),
        {
            "cat": "un chat",
            "car": "une voiture",
            "bread": "du pain",
            "sun": "le soleil",
            "umbrella": "un parapluie",
            "butterfly": "un papillon",
            "scissors": "des ciseaux",
        },
    ),
    "es": (
        (
            "En esta imagen se puede ver {word} sobre un fondo de un solo color",
            "Un pequeño dibujo de {word} para descargar gratis desde nuestra página",
            "Aquí aparece {word}, una ilustración sencilla con colores muy vivos",
        ),
        {
            "fish": "un pez",
            "banana": "un plátano",
            "bike": "una bicicleta",
            "moon": "la luna",
            "chair": "una silla",
            "horse": "un caballo",
            "church": "una iglesia",
        },
    ),
    "it": (
        (
            "In questa immagine si vede {word} davanti a uno sfondo di un solo colore",
            "Un piccolo disegno di {word} che puoi scaricare gratuitamente dal sito",
            "Ecco {word}, una semplice illustrazione con colori molto vivaci",
        ),
        {
            "bee": "un'ape",
            "pizza": "una pizza",
            "plane": "un aereo",
            "rose": "una rosa",
            "guitar": "una chitarra",
            "wolf": "un lupo",
            "candle": "una candela",
        },
    ),
    "ru": (
        (
            "На этой картинке изображено следующее: {word} на однотонном фоне",
            "Небольшой рисунок для сайта, на котором нарисовано: {word}",
            "Здесь вы видите яркую иллюстрацию, а на ней {word}",
        ),
        {
            "spider": "паук",
            "frog": "лягушка",
            "carrot": "морковь",
            "bus": "автобус",
            "mushroom": "гриб",
            "hat": "шляпа",
            "hammer": "молоток",
        },
    ),
    "ja": (
        (
            "この写真には、無地の背景の前にある{word}が写っています",
            "ウェブサイトで無料でダウンロードできる{word}の小さなイラストです",
            "ここに見えるのは、明るい色で描かれた{word}の絵です",
        ),
        {
            "owl": "フクロウ",
            "lemon": "レモン",
            "rocket": "ロケット",
            "rainbow": "虹",
            "door": "ドア",
            "penguin": "ペンギン",
            "camera": "カメラ",
        },
    ),
}


def good_captions(
    concept: Concept, rng: np.random.Generator, *, colour: str, where: str, count: int | None = None
) -> list[str]:
    """Captions that name the thing, each from another template.

    Args:
        concept: what the picture shows.
        rng: draws templates, their order, and where a synonym stands for the name.
        colour: a word for the background.
        where: a word for the thing's place: "middle", "left", "right", "top" or "bottom".
        count: how many; 3 or 4 if None.
    """
    count = int(rng.integers(3, 5)) if count is None else count
    captions = []
    for template in rng.permutation(len(GOOD))[:count]:
        captions.append(
            GOOD[template].format(
                thing=_thing(concept, rng),
                kind=concept.kind,
                colour=colour,
                a_colour=indefinite(colour),
                where=where,
            )
        )
    return captions


def _thing(concept: Concept, rng: np.random.Generator) -> str:
    """The name in three of four cases, otherwise one of its synonyms."""
    if concept.synonyms and rng.random() < 0.25:
        synonym = concept.synonyms[int(rng.integers(len(concept.synonyms)))]
        return with_article(synonym, concept.noun) if concept.noun in ("mass", "plural") else indefinite(synonym)
    return concept.phrase


def short_captions(concept: Concept, rng: np.random.Generator) -> list[str]:
    """Three captions of one or two words, some of them without any content."""
    word = concept.name.split()[-1]
    return [SHORT[i].format(word=word) for i in rng.permutation(len(SHORT))[:3]]


def other_language_captions(concept: str, language: str) -> list[str]:
    """Three sentences about a concept in another language.

    Raises:
        KeyError: we know no word for it in that language.
    """
    templates, words = OTHER_LANGUAGES[language]
    return [template.format(word=words[concept]) for template in templates]
