"""How each released folder is loaded, as its model card shows it. A test runs each of them as it stands."""

SNIPPETS = {
    "clip-open_clip": """
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:clip-open_clip")
tokenizer = open_clip.get_tokenizer("local-dir:clip-open_clip")
images = preprocess(Image.open("picture.png").convert("RGB")).unsqueeze(0)
texts = tokenizer(["a red apple", "a dog"])
with torch.no_grad():
    image, text = model.eval().encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
    logits = model.logit_scale.exp() * image @ text.T + (0 if model.logit_bias is None else model.logit_bias)
print(logits.softmax(-1))
""",
    "clip-transformers": """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("clip-transformers").eval()
# backend="pil" gives the pixels that the model was trained and measured on; the default is as good and faster
processor = AutoProcessor.from_pretrained("clip-transformers", backend="pil")
inputs = processor(
    images=Image.open("picture.png").convert("RGB"),
    text=["a red apple", "a dog"],
    padding="max_length",
    truncation=True,
    return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits_per_image
print(logits.softmax(-1))
""",
    "clip-lora": """
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoProcessor

base = AutoModel.from_pretrained("clip-transformers")
model = PeftModel.from_pretrained(base, "clip-lora").eval()
processor = AutoProcessor.from_pretrained("clip-transformers", backend="pil")
inputs = processor(
    images=Image.open("picture.png").convert("RGB"),
    text=["a red apple", "a dog"],
    padding="max_length",
    truncation=True,
    return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits_per_image
print(logits.softmax(-1))
""",
    "vlm": """
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("vlm").eval()
processor = AutoProcessor.from_pretrained("vlm")
image = Image.open("picture.png").convert("RGB")
content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
""",
    "vlm-lora": """
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("vlm")
model = PeftModel.from_pretrained(base, "vlm-lora").eval()
processor = AutoProcessor.from_pretrained("vlm")
image = Image.open("picture.png").convert("RGB")
content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
""",
}
