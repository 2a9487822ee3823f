"""Texts about images by the networks of a posterior whose vision tower is drawn too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.pipelines import any_to_any

import bayeformers
from bayeformers import fixed_draw, to_bayesian
from tests.training.trainers import tokenizer

Image = pytest.importorskip("PIL.Image")
PLACEHOLDER = 24  # of a picture, which a trained model does not write
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [PLACEHOLDER]}
DRAWS = 3
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def processor() -> Any:
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = hf.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return hf.LlavaProcessor(
        image_processor=pictures, tokenizer=words, patch_size=4, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def llava() -> Any:
    """A vision tower of two layers, of 4 patches, before a decoder of one; the same at every call."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    words = processor().tokenizer
    assert words.convert_tokens_to_ids("<image>") == PLACEHOLDER
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=8, patch_size=4, projection_dim=16),
        text_config=hf.LlamaConfig(
            **sizes, vocab_size=len(words), num_hidden_layers=1, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=1, bos_token_id=1, initializer_range=0.3,
        ),
        image_token_id=PLACEHOLDER, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def picture(seed: int) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def drawn(layers: Any = "all") -> Any:
    """Bayesian in the vision tower too; with linear layers alone the draws go in one batch."""
    return to_bayesian(llava(), delta=0.4, target_modules=layers).eval()


def describer(model: Any, task: str = "image-text-to-text", **options: Any) -> Any:
    return bayeformers.pipeline(
        task, model=model, processor=processor(), device="cpu", num_samples=DRAWS, **GREEDY | options
    )  # fmt: skip


PAIRS = [(picture(0), "<image> w1 w2"), (picture(1), "<image> w3 w4")]


def test_one_network_describes_as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hf.pipeline("image-text-to-text", model=llava(), processor=processor(), device="cpu", **GREEDY)
    (image, text), (second, other) = PAIRS
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w1 w2"}]}]
    beams = {"num_beams": 2, "num_return_sequences": 2}
    for call in (
        lambda pipe: pipe(image, text=text),
        lambda pipe: pipe([image, second], text=[text, other]),
        lambda pipe: pipe(text=chat),
        lambda pipe: pipe(image, text=text, generate_kwargs=dict(beams)),
    ):
        expected = call(plain)
        found = call(describer(llava()))
        assert [record["generated_text"] for record in found] == [record["generated_text"] for record in expected]
        assert all(record["uncertainty"]["epistemic"] == 0.0 for record in found)
    assert describer(llava(), "image-to-text")(image, text=text) == describer(llava())(image, text=text)
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *names: None)  # torchvision, for videos
    wanted = plain(image, text=text)[0]["generated_text"]
    anything = describer(llava(), "any-to-any")
    assert anything(images=image, text=text)[0]["generated_text"] == wanted
    with pytest.raises(ValueError, match="`generation_mode` must be 'text'"):
        anything(images=image, text=text, generation_mode="audio")


def by_hand(model: Any, images: list[Any], text: str) -> tuple[list[int], list[float]]:
    """The greedy path of the mean of draws that each see the pictures anew at each step, and its epistemic parts."""
    batch = processor()(images=images, text=text, return_tensors="pt")
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    start, parts = ids.shape[1], []
    for _ in range(GREEDY["max_new_tokens"]):
        each = []
        for index in range(DRAWS):
            with fixed_draw(model, index), torch.no_grad():
                each.append(model(input_ids=ids, pixel_values=pixels).logits[0, -1].double().softmax(-1))
        probs = torch.stack(each)
        mean = probs.mean(0)
        parts.append(float(-(mean * mean.log()).sum() + (probs * probs.log()).sum(-1).mean()))
        mean[PLACEHOLDER] = 0
        ids = torch.cat([ids, mean.argmax()[None, None]], 1)
        if int(ids[0, -1]) == 1:
            break
    return ids[0, start:].tolist(), parts


@pytest.mark.parametrize("layers", ["all", ["q_proj", "v_proj"]], ids=str)
def test_each_draw_looks_at_the_picture_itself(layers: Any) -> None:
    """transformers' ``generate`` would encode the picture once, before; against draws that are held one by one."""
    model = drawn(layers)
    pipe = describer(model, token_uncertainty=True)
    (image, text), (second, other) = PAIRS
    alone = [pipe(image, text=text)[0], pipe(second, text=other)[0]]
    both = pipe([image, second], text=[text, other])
    for record, again, (picture_, prompt) in zip(alone, both, PAIRS, strict=True):
        tokens, parts = by_hand(model, [picture_], prompt)
        words = processor().tokenizer.convert_ids_to_tokens(tokens)
        for found in (record, again):
            assert found["token_uncertainty"]["tokens"] == words
            assert found["token_uncertainty"]["epistemic"] == pytest.approx(parts, abs=1e-5)  # float32


@pytest.mark.parametrize(("count", "layers"), [(2, "all"), (DRAWS, "all"), (DRAWS, ["q_proj", "v_proj"])])
def test_several_pictures_in_one_prompt(count: int, layers: Any) -> None:
    """As many pictures as draws too, which are no rows of them."""
    model, images = drawn(layers), [picture(seed) for seed in range(count)]
    text = " ".join(["<image>"] * count) + " w5"
    tokens, parts = by_hand(model, images, text)
    found = describer(model, token_uncertainty=True)([images], text=[text])[0]["token_uncertainty"]
    assert found["tokens"] == processor().tokenizer.convert_ids_to_tokens(tokens)
    assert found["epistemic"] == pytest.approx(parts, abs=1e-5)
    answers = describer(model, mixing="draws", return_tensors=True)([images], text=[text])
    for index, record in enumerate(answers):
        batch = processor()(images=images, text=text, return_tensors="pt")
        with fixed_draw(model, index):
            expected = model.generate(**batch, **GREEDY)[0]
        assert record["generated_token_ids"][: len(expected)].tolist() == expected.tolist()
