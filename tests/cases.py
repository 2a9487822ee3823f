"""Tiny random models of many architectures, each with the layers that a conversion is expected to find.

The expected names are written by hand as brace patterns (``"layer.{0,1}.{query,key}"``), never computed from a model.
Every model has 2 layers, hidden size 16, non-zero biases, and a batch whose rows have different lengths.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn

Kind = Literal["Linear", "Embedding", "Conv1D", "Conv1d", "Conv2d"]
Part = Literal["head", "last", "middle", "embeddings"]
LENGTHS = (7, 5, 3)
CLASSES = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One architecture.

    ``head``, ``last`` (last block), ``middle`` (first block, or one projection of it) and ``embeddings`` are regular
    expressions for module names, matched in full. Of ``layers``, ``uncalled`` are never called by the forward (it calls
    others that share their weight, or reads it), and ``read`` have their weight read, by their owner or their own
    forward. ``bare``: names of matrices that belong to no layer; ``unused``: those of them that ``inputs`` do not need.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    labels: Callable[[], dict[str, Tensor]]
    layers: dict[str, Kind]
    tied: tuple[frozenset[str], ...] = ()
    head: str
    last: str
    middle: str
    embeddings: str
    uncalled: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()

    @property
    def modules(self) -> set[str]:
        """Names of the modules that convert."""
        return {*self.layers, *(name.rpartition(".")[0] for name in self.bare)}

    def tensors(self, model: nn.Module) -> set[str]:
        """All names of the Parameters of ``model`` that become random."""
        own = {f"{name}.{key}" for name in self.layers for key in model.get_submodule(name)._parameters}
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return {name for name in names if name in own or name in self.bare}

    def build(self) -> nn.Module:
        """The same model at every call, in ``eval()`` mode, with every parameter away from 0 and 1."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    def matching(self, part: Part) -> list[str]:
        """Names of the expected layers in ``part``; may be empty (a vision model has no ``nn.Embedding``)."""
        return [name for name in self.layers if re.fullmatch(getattr(self, part), name)]

    def parameters(self, model: nn.Module, *parts: Part) -> list[nn.Parameter]:
        """Distinct Parameters below the modules that ``parts`` name, convertible or not; no part: all of them."""
        patterns = [getattr(self, part) for part in parts] or [".*"]
        return list(
            {
                id(parameter): parameter
                for name, module in model.named_modules()
                if any(re.fullmatch(pattern, name) for pattern in patterns)
                for parameter in module.parameters()
            }.values()
        )


def expand(pattern: str) -> list[str]:
    """``"a.{0,1}.{k,v}"`` -> ``["a.0.k", "a.0.v", "a.1.k", "a.1.v"]``."""
    pieces = [piece.split(",") for piece in re.split(r"[{}]", pattern)]
    return ["".join(choice) for choice in itertools.product(*pieces)]


def layers(
    *, linear: str = "", embedding: str = "", conv1d: str = "", convolution1: str = "", convolution2: str = ""
) -> dict[str, Kind]:
    """Patterns separated by white space, per kind; ``conv1d`` is that of GPT-2, ``convolution1`` is torch's."""
    kinds: tuple[tuple[Kind, str], ...] = (
        ("Embedding", embedding),
        ("Linear", linear),
        ("Conv1D", conv1d),
        ("Conv1d", convolution1),
        ("Conv2d", convolution2),
    )
    return {name: kind for kind, patterns in kinds for pattern in patterns.split() for name in expand(pattern)}


def bare(patterns: str) -> frozenset[str]:
    """Patterns separated by white space."""
    return frozenset(name for pattern in patterns.split() for name in expand(pattern))


def tie(*names: str) -> frozenset[str]:
    return frozenset(names)


# --------------------------------------------------------------------------------------------------------- inputs


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def text(pad: int = 0, *, lengths: tuple[int, ...] = LENGTHS, eos: int | None = None) -> dict[str, Any]:
    """Right-padded ids in 4..63 with their mask; ``eos`` ends each row."""
    ids = torch.randint(4, 64, (len(lengths), max(lengths)), generator=generator())
    length = torch.tensor(lengths)[:, None]
    mask = (torch.arange(max(lengths)) < length).long()
    if eos is not None:
        ids.scatter_(1, length - 1, eos)
    return {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}


def token_types() -> dict[str, Any]:
    batch = text()
    return {**batch, "token_type_ids": (torch.arange(max(LENGTHS)) > 1).long() * batch["attention_mask"]}


def decoder_text(pad: int = 0) -> dict[str, Any]:
    target = text(pad, lengths=(4, 2, 3))
    return {"decoder_input_ids": target["input_ids"], "decoder_attention_mask": target["attention_mask"]}


def sequences() -> dict[str, Any]:
    return {**text(), **decoder_text()}


def image(size: int = 8) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(3, 3, size, size, generator=generator())}


def audio() -> dict[str, Any]:
    mask = (torch.arange(48) < torch.tensor((48, 40, 30))[:, None]).long()
    return {"input_values": torch.randn(3, 48, generator=generator()) * mask, "attention_mask": mask}


def spectrogram() -> dict[str, Any]:
    return {"input_features": torch.randn(3, 8, 32, generator=generator()), **decoder_text()}


def classes() -> dict[str, Tensor]:
    return {"labels": torch.tensor((0, 2, 1))}


def numbers() -> dict[str, Tensor]:
    return {"labels": torch.tensor((0.5, -1.0, 2.0))}


def label_sets() -> dict[str, Tensor]:
    return {"labels": torch.tensor(((1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 1.0)))}


def token_classes() -> dict[str, Tensor]:
    return {"labels": torch.where(text()["attention_mask"].bool(), text()["input_ids"] % CLASSES, -100)}


def tokens() -> dict[str, Tensor]:
    return {"labels": torch.where(text()["attention_mask"].bool(), text()["input_ids"], -100)}


def target_tokens() -> dict[str, Tensor]:
    target = decoder_text()
    return {"labels": torch.where(target["decoder_attention_mask"].bool(), target["decoder_input_ids"], -100)}


def spans() -> dict[str, Tensor]:
    return {"start_positions": torch.tensor((1, 0, 2)), "end_positions": torch.tensor((5, 3, 2))}


def no_labels() -> dict[str, Tensor]:
    return {}


# -------------------------------------------------------------------------------------------------------- configs

ENCODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {**ENCODER, **SPECIAL, "num_key_value_heads": 1}
GPT2: dict[str, Any] = {**SPECIAL, "vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
SEQ2SEQ: dict[str, Any] = {
    **SPECIAL,
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 2,
}

# --------------------------------------------------------------------------------------------- families of layers

BERT_BLOCKS = """{p}.encoder.layer.{0,1}.attention.self.{query,key,value} {p}.encoder.layer.{0,1}.attention.output.dense
    {p}.encoder.layer.{0,1}.intermediate.dense {p}.encoder.layer.{0,1}.output.dense"""
BERT_EMBEDDINGS = "{p}.embeddings.{word,position,token_type}_embeddings"
LLAMA_BLOCKS = "model.layers.{0,1}.self_attn.{q,k,v,o}_proj model.layers.{0,1}.mlp.{gate,up,down}_proj"
VIT_BLOCKS = "{p}.layers.{0,1}.attention.{q,k,v,o}_proj {p}.layers.{0,1}.mlp.{fc1,fc2}"
CLIP_BLOCKS = "{p}.encoder.layers.{0,1}.self_attn.{q,k,v,out}_proj {p}.encoder.layers.{0,1}.mlp.{fc1,fc2}"
BART_ENCODER = "{p}.layers.{0,1}.self_attn.{q,k,v,out}_proj {p}.layers.{0,1}.{fc1,fc2}"
BART_DECODER = BART_ENCODER + " {p}.layers.{0,1}.encoder_attn.{q,k,v,out}_proj"
GPT2_BLOCKS = "transformer.h.{0,1}.attn.{c_attn,c_proj} transformer.h.{0,1}.mlp.{c_fc,c_proj}"


def at(prefix: str, patterns: str) -> str:
    return patterns.replace("{p}", prefix) + " "


def encoder_parts(prefix: str, head: str, middle: str = "query") -> dict[str, Any]:
    """Parts of a BERT-like model."""
    return {
        "head": head,
        "last": rf"{prefix}\.encoder\.layer\.1\..*",
        "middle": rf"{prefix}\.encoder\.layer\.0\..*{middle}",
        "embeddings": rf"{prefix}\.embeddings\..*",
    }


def decoder_parts(block: str, head: str, middle: str, embeddings: str) -> dict[str, Any]:
    return {"head": head, "last": rf"{block}\.1\..*", "middle": rf"{block}\.0\..*{middle}", "embeddings": embeddings}


def bert(name: str, model: str, labels: Callable[[], dict[str, Tensor]], extra: str, head: str, **more: Any) -> Case:
    config = {key: more.pop(key) for key in ("num_labels", "problem_type") if key in more}
    return Case(
        name=name,
        make=lambda: getattr(hf, model)(hf.BertConfig(**ENCODER, **config)),
        inputs=token_types,
        labels=labels,
        layers=layers(embedding=at("bert", BERT_EMBEDDINGS), linear=at("bert", BERT_BLOCKS) + extra),
        **encoder_parts("bert", head),
        **more,
    )


def llama_like(
    name: str, model: str, config: str, head: str, blocks: str = LLAMA_BLOCKS, bare_names: str = "", **options: Any
) -> Case:
    return Case(
        name=name,
        make=lambda: getattr(hf, model)(getattr(hf, config)(**DECODER, **options)),
        inputs=text,
        labels=classes if head == "score" else tokens,
        layers=layers(embedding="model.embed_tokens", linear=f"{blocks} {head}"),
        bare=bare(bare_names),
        **decoder_parts(r"model\.layers", head, "q_proj", r"model\.embed_tokens"),
    )


def vit_like(name: str, model: str, config: str, tokens: str) -> Case:
    return Case(
        name=name,
        make=lambda: getattr(hf, model)(getattr(hf, config)(**VISION, num_labels=CLASSES)),
        inputs=image(),
        labels=classes,
        layers=layers(
            linear=at(name, VIT_BLOCKS) + "classifier",
            convolution2=f"{name}.embeddings.patch_embeddings.projection",
        ),
        bare=bare(f"{name}.embeddings.{{{tokens},position_embeddings}}"),
        head="classifier",
        last=rf"{name}\.layers\.1\..*",
        middle=rf"{name}\.layers\.0\..*q_proj",
        embeddings=rf"{name}\.embeddings\..*",
    )


# ----------------------------------------------------------------------------------------------------- the matrix

CASES: tuple[Case, ...] = (
    bert("bert", "BertForSequenceClassification", classes, "bert.pooler.dense classifier", "classifier", num_labels=3),
    bert(
        "bert-regression",
        "BertForSequenceClassification",
        numbers,
        "bert.pooler.dense classifier",
        "classifier",
        num_labels=1,
    ),
    bert(
        "bert-multi-label",
        "BertForSequenceClassification",
        label_sets,
        "bert.pooler.dense classifier",
        "classifier",
        num_labels=3,
        problem_type="multi_label_classification",
    ),
    bert("bert-tokens", "BertForTokenClassification", token_classes, "classifier", "classifier", num_labels=3),
    bert("bert-qa", "BertForQuestionAnswering", spans, "qa_outputs", "qa_outputs"),
    bert(
        "bert-mlm",
        "BertForMaskedLM",
        tokens,
        "cls.predictions.transform.dense cls.predictions.decoder",
        r"cls\..*",
        tied=(
            tie("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
            tie("cls.predictions.bias", "cls.predictions.decoder.bias"),
        ),
    ),
    Case(
        name="roberta",
        make=lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER, num_labels=CLASSES)),
        inputs=lambda: text(pad=1),
        labels=classes,
        layers=layers(
            embedding=at("roberta", BERT_EMBEDDINGS),
            linear=at("roberta", BERT_BLOCKS) + "classifier.{dense,out_proj}",
        ),
        **encoder_parts("roberta", r"classifier\..*"),
    ),
    Case(
        name="xlm-roberta",
        make=lambda: hf.XLMRobertaForTokenClassification(hf.XLMRobertaConfig(**ENCODER, num_labels=CLASSES)),
        inputs=lambda: text(pad=1),
        labels=token_classes,
        layers=layers(embedding=at("roberta", BERT_EMBEDDINGS), linear=at("roberta", BERT_BLOCKS) + "classifier"),
        **encoder_parts("roberta", "classifier"),
    ),
    Case(
        name="distilbert",
        make=lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                vocab_size=64,
                dim=16,
                n_layers=2,
                n_heads=2,
                hidden_dim=32,
                max_position_embeddings=32,
                num_labels=CLASSES,
            )
        ),
        inputs=text,
        labels=classes,
        layers=layers(
            embedding="distilbert.embeddings.{word,position}_embeddings",
            linear="""distilbert.transformer.layer.{0,1}.attention.{q,k,v,out}_lin
                distilbert.transformer.layer.{0,1}.ffn.{lin1,lin2} pre_classifier classifier""",
        ),
        **decoder_parts(
            r"distilbert\.transformer\.layer", "(pre_)?classifier", r"q_lin", r"distilbert\.embeddings\..*"
        ),
    ),
    Case(
        name="albert",
        make=lambda: hf.AlbertForSequenceClassification(
            hf.AlbertConfig(**ENCODER, embedding_size=8, num_labels=CLASSES)
        ),
        inputs=token_types,
        labels=classes,
        layers=layers(
            embedding=at("albert", BERT_EMBEDDINGS),
            linear="""albert.encoder.embedding_hidden_mapping_in
                albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{query,key,value,dense}
                albert.encoder.albert_layer_groups.0.albert_layers.0.{ffn,ffn_output} albert.pooler classifier""",
        ),
        head="classifier",
        last=r"albert\.pooler",
        middle=r".*albert_layers\.0\..*query",
        embeddings=r"albert\.embeddings\..*",
    ),
    Case(
        name="electra",
        make=lambda: hf.ElectraForSequenceClassification(
            hf.ElectraConfig(**ENCODER, embedding_size=8, num_labels=CLASSES)
        ),
        inputs=token_types,
        labels=classes,
        layers=layers(
            embedding=at("electra", BERT_EMBEDDINGS),
            linear=at("electra", BERT_BLOCKS) + "electra.embeddings_project classifier.{dense,out_proj}",
        ),
        **encoder_parts("electra", r"classifier\..*"),
    ),
    Case(
        name="deberta-v2",
        make=lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                **ENCODER,
                relative_attention=True,
                pos_att_type=["c2p", "p2c"],
                position_biased_input=False,
                norm_rel_ebd="layer_norm",
                share_att_key=True,
                position_buckets=8,
                num_labels=CLASSES,
            )
        ),
        inputs=text,
        labels=classes,
        layers=layers(
            embedding="deberta.embeddings.word_embeddings deberta.encoder.rel_embeddings",
            linear="""deberta.encoder.layer.{0,1}.attention.self.{query,key,value}_proj
                deberta.encoder.layer.{0,1}.attention.output.dense deberta.encoder.layer.{0,1}.intermediate.dense
                deberta.encoder.layer.{0,1}.output.dense pooler.dense classifier""",
        ),
        **encoder_parts("deberta", "classifier", "query_proj"),
        uncalled=frozenset({"deberta.encoder.rel_embeddings"}),
        read=frozenset({"deberta.encoder.rel_embeddings"}),
    ),
    Case(
        name="mpnet",
        make=lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**ENCODER, num_labels=CLASSES)),
        inputs=lambda: text(pad=1),
        labels=classes,
        layers=layers(
            embedding="mpnet.embeddings.{word,position}_embeddings mpnet.encoder.relative_attention_bias",
            linear="""mpnet.encoder.layer.{0,1}.attention.attn.{q,k,v,o} mpnet.encoder.layer.{0,1}.intermediate.dense
                mpnet.encoder.layer.{0,1}.output.dense classifier.{dense,out_proj}""",
        ),
        **encoder_parts("mpnet", r"classifier\..*", r"\.q"),
    ),
    Case(
        name="modernbert",
        make=lambda: hf.ModernBertForSequenceClassification(
            hf.ModernBertConfig(
                **ENCODER,
                **SPECIAL,
                cls_token_id=1,
                sep_token_id=2,
                local_attention=4,
                global_attn_every_n_layers=2,
                num_labels=CLASSES,
            )
        ),
        inputs=text,
        labels=classes,
        layers=layers(
            embedding="model.embeddings.tok_embeddings",
            linear="model.layers.{0,1}.attn.{Wqkv,Wo} model.layers.{0,1}.mlp.{Wi,Wo} head.dense classifier",
        ),
        **decoder_parts(r"model\.layers", "classifier", "Wqkv", r"model\.embeddings\..*"),
    ),
    Case(
        name="longformer",
        make=lambda: hf.LongformerForSequenceClassification(
            hf.LongformerConfig(**ENCODER, attention_window=4, num_labels=CLASSES)
        ),
        inputs=lambda: text(pad=1),
        labels=classes,
        layers=layers(
            embedding=at("longformer", BERT_EMBEDDINGS),
            linear=at("longformer", BERT_BLOCKS)
            + "longformer.encoder.layer.{0,1}.attention.self.{query,key,value}_global classifier.{dense,out_proj}",
        ),
        **encoder_parts("longformer", r"classifier\..*"),
    ),
    Case(
        name="funnel",
        make=lambda: hf.FunnelForSequenceClassification(
            hf.FunnelConfig(
                vocab_size=64,
                block_sizes=[1, 1],
                d_model=16,
                n_head=2,
                d_head=8,
                d_inner=32,
                max_position_embeddings=32,
                num_labels=CLASSES,
            )
        ),
        inputs=token_types,
        labels=classes,
        layers=layers(
            embedding="funnel.embeddings.word_embeddings",
            linear="""funnel.encoder.blocks.{0,1}.0.attention.{q_head,k_head,v_head,post_proj}
                funnel.encoder.blocks.{0,1}.0.ffn.{linear_1,linear_2} classifier.{linear_hidden,linear_out}""",
        ),
        bare=bare("funnel.encoder.blocks.{0,1}.0.attention.{r_w_bias,r_r_bias,r_kernel,r_s_bias,seg_embed}"),
        **decoder_parts(r"funnel\.encoder\.blocks", r"classifier\..*", "q_head", r"funnel\.embeddings\..*"),
    ),
    Case(
        name="xlnet",
        make=lambda: hf.XLNetForSequenceClassification(
            hf.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32, num_labels=CLASSES)
        ),
        inputs=token_types,  # without them its segment embeddings have no part
        labels=classes,
        layers=layers(
            embedding="transformer.word_embedding",
            linear="transformer.layer.{0,1}.ff.{layer_1,layer_2} sequence_summary.summary logits_proj",
        ),
        bare=bare(
            "transformer.mask_emb transformer.layer.{0,1}.rel_attn.{q,k,v,o,r,r_r_bias,r_s_bias,r_w_bias,seg_embed}"
        ),
        unused=frozenset({"transformer.mask_emb"}),  # for `target_mapping`, in pretraining
        **decoder_parts(r"transformer\.layer", "logits_proj", "layer_1", r"transformer\.word_embedding"),
    ),
    Case(
        name="gpt2",
        make=lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2, num_labels=CLASSES)),
        inputs=text,
        labels=classes,
        layers=layers(embedding="transformer.{wte,wpe}", linear="score", conv1d=GPT2_BLOCKS),
        **decoder_parts(r"transformer\.h", "score", "c_attn", r"transformer\.w[tp]e"),
    ),
    Case(
        name="gpt2-lm",
        make=lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        inputs=text,
        labels=tokens,
        layers=layers(embedding="transformer.{wte,wpe}", linear="lm_head", conv1d=GPT2_BLOCKS),
        tied=(tie("transformer.wte.weight", "lm_head.weight"),),
        **decoder_parts(r"transformer\.h", "lm_head", "c_attn", r"transformer\.w[tp]e"),
    ),
    llama_like("llama", "LlamaForSequenceClassification", "LlamaConfig", "score", num_labels=CLASSES),
    llama_like("llama-lm", "LlamaForCausalLM", "LlamaConfig", "lm_head"),
    llama_like("mistral-lm", "MistralForCausalLM", "MistralConfig", "lm_head"),
    llama_like("qwen2", "Qwen2ForSequenceClassification", "Qwen2Config", "score", num_labels=CLASSES),
    llama_like(
        "mixtral-lm",
        "MixtralForCausalLM",
        "MixtralConfig",
        "lm_head",
        blocks="model.layers.{0,1}.self_attn.{q,k,v,o}_proj",
        bare_names="model.layers.{0,1}.mlp.gate.weight model.layers.{0,1}.mlp.experts.{gate_up,down}_proj",
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    Case(
        name="bloom-lm",
        make=lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2, **SPECIAL)),
        inputs=text,
        labels=tokens,
        layers=layers(
            embedding="transformer.word_embeddings",
            linear="""transformer.h.{0,1}.self_attention.{query_key_value,dense}
                transformer.h.{0,1}.mlp.{dense_h_to_4h,dense_4h_to_h} lm_head""",
        ),
        tied=(tie("transformer.word_embeddings.weight", "lm_head.weight"),),
        **decoder_parts(r"transformer\.h", "lm_head", "query_key_value", r"transformer\.word_embeddings"),
    ),
    Case(
        name="opt-lm",
        make=lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=64,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=32,
                max_position_embeddings=32,
                word_embed_proj_dim=16,
                **SPECIAL,
            )
        ),
        inputs=text,
        labels=tokens,
        layers=layers(
            embedding="model.decoder.embed_{tokens,positions}", linear=at("model.decoder", BART_ENCODER) + "lm_head"
        ),
        tied=(tie("model.decoder.embed_tokens.weight", "lm_head.weight"),),
        **decoder_parts(r"model\.decoder\.layers", "lm_head", "q_proj", r"model\.decoder\.embed_.*"),
    ),
    Case(
        name="gpt-neox-lm",
        make=lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**ENCODER, **SPECIAL)),
        inputs=text,
        labels=tokens,
        layers=layers(
            embedding="gpt_neox.embed_in",
            linear="""gpt_neox.layers.{0,1}.attention.{query_key_value,dense}
                gpt_neox.layers.{0,1}.mlp.{dense_h_to_4h,dense_4h_to_h} lm_head""",
        ),
        **decoder_parts(r"gpt_neox\.layers", "lm_head", "query_key_value", r"gpt_neox\.embed_in"),
    ),
    Case(
        name="t5",
        make=lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        inputs=sequences,
        labels=target_tokens,
        layers=layers(
            embedding="shared {en,de}coder.embed_tokens "
            "{en,de}coder.block.0.layer.0.SelfAttention.relative_attention_bias",
            linear="""{en,de}coder.block.{0,1}.layer.0.SelfAttention.{q,k,v,o}
                decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v,o} encoder.block.{0,1}.layer.1.DenseReluDense.{wi,wo}
                decoder.block.{0,1}.layer.2.DenseReluDense.{wi,wo} lm_head""",
        ),
        tied=(tie("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),),
        **decoder_parts(r"decoder\.block", "lm_head", r"SelfAttention\.q", r"shared|(en|de)coder\.embed_tokens"),
        uncalled=frozenset({"shared"}),
    ),
    Case(
        name="bart-lm",
        make=lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=32)),
        inputs=sequences,
        labels=target_tokens,
        layers=layers(
            # subclasses of nn.Embedding that call super().forward
            embedding="model.shared model.{en,de}coder.embed_{tokens,positions}",
            linear=at("model.encoder", BART_ENCODER) + at("model.decoder", BART_DECODER) + "lm_head",
        ),
        tied=(
            tie(
                "model.shared.weight",
                "model.encoder.embed_tokens.weight",
                "model.decoder.embed_tokens.weight",
                "lm_head.weight",
            ),
        ),
        **decoder_parts(
            r"model\.decoder\.layers", "lm_head", r"self_attn\.q_proj", r"model\.(shared|..coder\.embed_.*)"
        ),
        uncalled=frozenset({"model.shared"}),
    ),
    Case(
        name="bart",
        make=lambda: hf.BartForSequenceClassification(
            hf.BartConfig(**SEQ2SEQ, max_position_embeddings=32, num_labels=CLASSES)
        ),
        inputs=lambda: text(eos=2),
        labels=classes,
        layers=layers(
            embedding="model.shared model.{en,de}coder.embed_{tokens,positions}",
            linear=at("model.encoder", BART_ENCODER)
            + at("model.decoder", BART_DECODER)
            + "classification_head.{dense,out_proj}",
        ),
        tied=(tie("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),),
        **decoder_parts(
            r"model\.decoder\.layers",
            r"classification_head\..*",
            r"self_attn\.q_proj",
            r"model\.(shared|..coder\.embed_.*)",
        ),
        uncalled=frozenset({"model.shared"}),
    ),
    Case(
        name="whisper",
        make=lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=16)
        ),
        inputs=spectrogram,
        labels=target_tokens,
        layers=layers(
            embedding="model.encoder.embed_positions model.decoder.embed_{tokens,positions}",
            linear=at("model.encoder", BART_ENCODER) + at("model.decoder", BART_DECODER) + "proj_out",
            convolution1="model.encoder.conv{1,2}",
        ),
        read=frozenset({"model.decoder.embed_positions"}),  # WhisperPositionalEmbedding slices its weight
        tied=(tie("model.decoder.embed_tokens.weight", "proj_out.weight"),),
        **decoder_parts(r"model\.decoder\.layers", "proj_out", r"self_attn\.q_proj", r"model\.decoder\.embed_tokens"),
    ),
    vit_like("vit", "ViTForImageClassification", "ViTConfig", "cls_token"),
    vit_like("deit", "DeiTForImageClassification", "DeiTConfig", "cls_token,distillation_token"),
    Case(
        name="swin",
        make=lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=8,
                patch_size=2,
                embed_dim=8,
                depths=[1, 1],
                num_heads=[2, 2],
                window_size=2,
                num_labels=CLASSES,
            )
        ),
        inputs=image(),
        labels=classes,
        layers=layers(
            linear="""swin.encoder.layers.{0,1}.blocks.0.attention.{q,k,v,o}_proj
                swin.encoder.layers.{0,1}.blocks.0.mlp.{fc1,fc2} swin.encoder.layers.0.downsample.reduction
                classifier""",
            convolution2="swin.embeddings.patch_embeddings.projection",
        ),
        bare=bare("swin.encoder.layers.{0,1}.blocks.0.attention.relative_position_bias.relative_position_bias_table"),
        **decoder_parts(r"swin\.encoder\.layers", "classifier", "q_proj", r"swin\.embeddings\..*"),
    ),
    Case(
        name="convnext",
        make=lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(
                image_size=16, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=CLASSES
            )
        ),
        inputs=image(16),
        labels=classes,
        layers=layers(
            linear="convnext.encoder.stages.{0,1}.layers.0.{pwconv1,pwconv2} classifier",
            convolution2="""convnext.embeddings.patch_embeddings convnext.encoder.stages.{0,1}.layers.0.dwconv
                convnext.encoder.stages.1.downsampling_layer.1""",
        ),
        **decoder_parts(r"convnext\.encoder\.stages", "classifier", "pwconv1", r"convnext\.embeddings\..*"),
    ),
    Case(
        name="wav2vec2",
        make=lambda: hf.Wav2Vec2ForSequenceClassification(
            hf.Wav2Vec2Config(
                vocab_size=32,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                conv_dim=(8, 8),
                conv_kernel=(4, 3),
                conv_stride=(2, 2),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                classifier_proj_size=8,
                num_labels=CLASSES,
            )
        ),
        inputs=audio,
        labels=classes,
        layers=layers(
            linear="""wav2vec2.feature_projection.projection wav2vec2.encoder.layers.{0,1}.attention.{q,k,v,out}_proj
                wav2vec2.encoder.layers.{0,1}.feed_forward.{intermediate,output}_dense projector classifier""",
            convolution1="wav2vec2.feature_extractor.conv_layers.{0,1}.conv",
        ),
        bare=bare("wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original{0,1}"),  # weight norm
        **decoder_parts(r"wav2vec2\.encoder\.layers", "classifier", "q_proj", r"wav2vec2\.feature_projection\..*"),
    ),
    Case(
        name="clip",
        make=lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**ENCODER, **SPECIAL, "projection_dim": 8},
                vision_config={**VISION, "projection_dim": 8},
                projection_dim=8,
            )
        ),
        inputs=lambda: {**text(eos=2), **image()()},
        labels=no_labels,
        layers=layers(
            embedding="text_model.embeddings.{token,position}_embedding vision_model.embeddings.position_embedding",
            linear=at("text_model", CLIP_BLOCKS) + at("vision_model", CLIP_BLOCKS) + "{text,visual}_projection",
            convolution2="vision_model.embeddings.patch_embedding",
        ),
        head="(text|visual)_projection",
        last=r"text_model\.encoder\.layers\.1\..*",
        middle=r"vision_model\.encoder\.layers\.0\..*q_proj",
        embeddings=r"text_model\.embeddings\..*",
    ),
)


def case(name: str) -> Case:
    """The case of that name."""
    return next(item for item in CASES if item.name == name)
