"""Every family of the table: what transformers' own tests ask of a model, of each Fast class from a tiny random config."""

import copy
import pickle
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import transformers
from tiny import SMALL, outputs, same, tiny_model
from transformers import (
    CONFIG_MAPPING,
    TOKENIZER_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
)

import hf_fff
from hf_fff import Calibration, FFNInterface, fff_usage, register_family
from hf_fff import convert_ffn_to_fff as convert_and_warn
from hf_fff.layers import FFF
from hf_fff.models import FAMILIES, fast_class
from hf_fff.models.classes import heads
from hf_fff.models.page import left_out, page

# What stands for the others in the fast tests: a plain one, masks and positions made in between, one block, shared layers,
# several networks a layer, channels first, and gated with masks that differ from layer to layer.
CHOICE = ["roberta", "deberta-v2", "distilbert", "albert", "mobilebert", "squeezebert", "modernbert"]
EACH = [pytest.param(t, marks=[] if t in CHOICE else pytest.mark.full) for t in FAMILIES]
each_family = pytest.mark.parametrize("family", EACH)


def convert(model, config="4x3", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return convert_and_warn(model, config, **options)


def ids(rows=3, tokens=9, seed=0):
    return torch.randint(5, 120, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def batch_for(model, rows=3, tokens=9):
    batch = {"input_ids": ids(rows, tokens)}
    if "MultipleChoice" in type(model).__name__:
        batch = {k: torch.stack([v, v.flip(0)]) for k, v in batch.items()}
    return batch


def load_clean(auto, folder, **options):
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def trees(model):
    return [ffn.fast for block in model.family.blocks(model.base_model) for ffn in model.family.ffns(block)]


# --- each head ------------------------------------------------------------------------------------------------------

HEADS = [(t, name) for t in FAMILIES for name in heads(t)]


def test_all_are_there():
    assert len(FAMILIES) == 21 and len(HEADS) == 128
    assert len({name for _, name in HEADS}) == 128 and set(hf_fff.__all__) >= {f"Fast{name}" for _, name in HEADS}


def test_all_models_of_transformers_but_decoders():
    left = {name for family in FAMILIES for name in left_out(family)}
    decoders = {c.__name__ for c in transformers.MODEL_FOR_CAUSAL_LM_MAPPING.values()}
    assert left - decoders == {"EsmForProteinFolding"}  # of which ESM is a part; no Auto class gives it
    assert len(left & decoders) == 8 and not decoders & {name for _, name in HEADS}


@pytest.mark.parametrize(("family", "name"), HEADS, ids=[name for _, name in HEADS])
def test_save_and_load(tmp_path, family, name):
    """Bit for bit; under its public name, and through each Auto class that gives the dense one."""
    dense = tiny_model(family, name)
    fast = convert(dense)
    assert type(fast) is getattr(hf_fff, f"Fast{name}") is fast_class(type(dense)) and isinstance(fast, type(dense))
    assert fast.config.model_type == f"fast{family}" and all(isinstance(tree, FFF) for tree in trees(fast))
    assert not any(t.is_meta for t in (*fast.parameters(), *fast.buffers()))
    batch = batch_for(fast)
    want = outputs(fast, batch, output_hidden_states=True)
    assert not same(want, outputs(dense, batch, output_hidden_states=True))
    fast.save_pretrained(tmp_path)
    for auto in heads(family)[name]:
        loaded = load_clean(auto, tmp_path)
        assert type(loaded) is type(fast) and loaded.config.fff_layers == fast.config.fff_layers
        assert same(loaded.state_dict(), fast.state_dict())
        assert same(outputs(loaded, batch, output_hidden_states=True), want)


# --- each family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_names(family):
    config = convert(tiny_model(family)).config
    assert type(config).__name__ == f"Fast{CONFIG_MAPPING[family].__name__}"
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    for name in (type(config).__name__, *(f"Fast{n}" for n in heads(family))):
        named = getattr(hf_fff, name)
        assert pickle.loads(pickle.dumps(named)) is named and named.__doc__ and name in dir(hf_fff)
    assert not hasattr(hf_fff, f"Fast{CONFIG_MAPPING[family].__name__.removesuffix('Config')}ForCausalLM")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer(family):
    config = convert(tiny_model(family)).config
    theirs = TOKENIZER_MAPPING.get(CONFIG_MAPPING[family], None)
    mine = TOKENIZER_MAPPING.get(type(config), None)
    as_set = [set(t) if isinstance(t, tuple) else {t} for t in (mine, theirs)]
    assert as_set[0] - {None} <= as_set[1] and bool(as_set[0] - {None}) == bool(as_set[1] - {None})


@each_family
def test_the_input_model_is_unchanged(family):
    dense = tiny_model(family)
    state, batch = copy.deepcopy(dense.state_dict()), batch_for(dense)
    want, modules = outputs(dense, batch), [(n, type(m)) for n, m in dense.named_modules()]
    fast = convert(dense, calibration=plan(steps=1))
    assert same(dense.state_dict(), state) and same(outputs(dense, batch), want)
    assert [(n, type(m)) for n, m in dense.named_modules()] == modules and not hasattr(dense.config, "fff")
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in dense.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in fast.modules())
    theirs = dict(dense.named_parameters())
    for name, p in fast.named_parameters():
        if not fast.family.ffn_key().search(name):
            assert p is theirs[name], name


@each_family
def test_some_layers(family, tmp_path):
    dense = tiny_model(family)
    if FAMILIES[family].shared:
        pytest.skip("its layers share one network")
    fast = convert(dense, {1: "mlp:8", 2: "none"})
    kinds = [{type(f.fast).__name__ for f in fast.family.ffns(b)} for b in fast.family.blocks(fast.base_model)]
    assert kinds == [{"NoneType"}, {"MLP"}, {"NoFFN"}]
    fast.save_pretrained(tmp_path)
    batch = batch_for(fast)
    assert same(outputs(load_clean(AutoModel, tmp_path), batch), outputs(fast, batch))
    before = [outputs(m, batch, output_hidden_states=True)["hidden_states.1"] for m in (dense, fast)]
    assert torch.equal(*before)


@each_family
def test_missing_ffn_weights(family, tmp_path):
    fast = convert(tiny_model(family))
    state = fast.state_dict()
    name = next(n for n in state if n.endswith("weight_out"))
    fast.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=rf"1 missing \({name}"):
        AutoModel.from_pretrained(tmp_path)
    tiny_model(family).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="convert_ffn_to_fff"):
        type(fast).from_pretrained(tmp_path / "dense")


@each_family
def test_tied_weights_and_resize(family, tmp_path):
    dense = tiny_model(family, "ForMaskedLM")
    fast = convert(dense)
    fast.save_pretrained(tmp_path / "tied")
    for model in (fast, load_clean(transformers.AutoModelForMaskedLM, tmp_path / "tied")):
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight)
    batch = batch_for(fast)
    dense.resize_token_embeddings(130)
    try:
        dense(**batch)
    except RuntimeError:
        pytest.skip("the dense model does not run after it has been resized")
    fast.resize_token_embeddings(130)
    assert outputs(fast, batch)["logits"].shape[-1] == 130
    fast.save_pretrained(tmp_path / "resized")
    loaded = load_clean(transformers.AutoModelForMaskedLM, tmp_path / "resized")
    assert same(outputs(loaded, batch), outputs(fast, batch))


@each_family
def test_training(family):
    """Each tree gets a gradient, a step lowers the loss, and gradient checkpointing changes nothing."""
    fast = convert(tiny_model(family, "ForMaskedLM"), "2x3").train()
    batch = batch_for(fast) | {"labels": ids()}

    def gradients():
        fast.zero_grad()
        fast(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in fast.named_parameters() if p.grad is not None}

    want = gradients()
    assert all(p in want for p, _ in fast.named_parameters() if fast.family.ffn_key().search(p))
    if fast.supports_gradient_checkpointing:
        fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        got = gradients()
        fast.gradient_checkpointing_disable()
        assert want.keys() == got.keys() and all(torch.allclose(want[k], got[k], atol=1e-5, rtol=1e-4) for k in want)
    optimizer = torch.optim.AdamW(fast.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = fast(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@each_family
def test_attention_implementations_agree(family, tmp_path):
    fast = convert(tiny_model(family))
    if not fast._supports_sdpa:
        pytest.skip("it has one implementation")
    fast.save_pretrained(tmp_path)
    batch = batch_for(fast)
    got = [
        outputs(AutoModel.from_pretrained(tmp_path, attn_implementation=name), batch)["last_hidden_state"]
        for name in ("eager", "sdpa")
    ]
    assert torch.allclose(*got, atol=1e-4 * float(got[0].std()), rtol=1e-3)


@pytest.mark.parametrize("family", ["modernbert", "nomic_bert"])
def test_long_inputs(family, tmp_path):
    """8192 tokens go through, and a shorter row beside them as if it were alone."""
    fast = convert(tiny_model(family, max_position_embeddings=8192, num_hidden_layers=2), "1x3")
    fast.save_pretrained(tmp_path)
    batch = {"input_ids": ids(2, 8192), "attention_mask": torch.ones(2, 8192, dtype=torch.long)}
    batch["attention_mask"][1, 3000:] = 0
    out = outputs(fast, batch)["last_hidden_state"]
    alone = outputs(AutoModel.from_pretrained(tmp_path), {"input_ids": batch["input_ids"][1:, :3000]})[
        "last_hidden_state"
    ]
    assert out.isfinite().all() and torch.allclose(out[1:, :3000], alone, atol=1e-4)


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    """A text gives the same alone and padded in a batch, as far as the dense model does."""
    dense = tiny_model(family)
    fast = convert(dense)
    text, pad = ids(1, 6, seed=3), torch.full((1, 3), 1)
    order = [pad, text] if side == "left" else [text, pad]
    padded = torch.cat([ids(1, 9), torch.cat(order, 1)])
    mask, position = torch.ones_like(padded), slice(3, None) if side == "left" else slice(6)
    mask[1] = torch.cat([torch.full_like(t, int(t is text)) for t in order], 1)
    positions = {}
    if side == "left" and "position_ids" in type(dense).forward.__annotations__:
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    error = []
    for model in (dense, fast):
        alone_positions = {"position_ids": torch.arange(6)[None]} if positions else {}
        alone = outputs(model, {"input_ids": text, **alone_positions})["last_hidden_state"][0]
        batch = outputs(model, {"input_ids": padded, "attention_mask": mask, **positions})["last_hidden_state"][1]
        error.append(float((alone - batch[position]).abs().max() / alone.std()))
    if error[0] > 1e-3:
        pytest.skip("the dense model looks at padding, or at absolute places")
    assert error[1] < 1e-3


@each_family
def test_copy_pickle_and_half_precision(family, tmp_path):
    fast = convert(tiny_model(family, "ForSequenceClassification"))
    batch = batch_for(fast)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert same(outputs(other, batch), outputs(fast, batch))
    fast.save_pretrained(tmp_path)
    base, inner = AutoModel.from_pretrained(tmp_path).state_dict(), fast.base_model.state_dict()  # the base from a head
    assert same({k: base[k] for k in base if k in inner}, {k: inner[k] for k in inner if k in base})
    assert all("pooler" in k for k in set(base) ^ set(inner))
    loaded = load_clean(transformers.AutoModelForSequenceClassification, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for tree in trees(loaded) for p in tree.parameters()} == {torch.bfloat16}
    if family != "deberta":  # which keeps some of its parameters in float32, and does not run
        assert outputs(loaded, batch)["logits"].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_plans(family):
    """Each entry names something that is there; the embedding's is that of the module itself, by which transformers knows it
    where it is tied."""
    fast = convert(tiny_model(family, "ForMaskedLM"))
    names = dict(fast.named_modules())
    plan = {**fast.fsdp_plan, **(fast.tp_plan or {})}
    assert all(any(fnmatchcase(name, entry) for name in names) for entry in plan), plan
    assert any(names.get(entry) is fast.get_input_embeddings() for entry in fast.fsdp_plan)
    blocks = {id(block) for block in fast.family.blocks(fast.base_model)}
    assert blocks <= {id(names[name]) for entry in fast.fsdp_plan for name in names if fnmatchcase(name, entry)}


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_compile(family):
    fast = convert(tiny_model(family))
    batch = batch_for(fast)
    compiled = torch.compile(fast, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(**batch)[0], fast(**batch)[0], atol=1e-4)


@each_family
def test_pipelines(family, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(115))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(tmp_path, model_input_names=["input_ids", "attention_mask"])
    for task, head in [
        ("feature-extraction", "Model"),
        ("fill-mask", "ForMaskedLM"),
        ("text-classification", "ForSequenceClassification"),
        ("token-classification", "ForTokenClassification"),
    ]:
        model = convert(tiny_model(family, head))
        result = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")("word1 [MASK] word7")
        assert len(result) == (5 if task == "fill-mask" else 3 if task == "token-classification" else 1)


# --- calibration ----------------------------------------------------------------------------------------------------


def plan(rows=120, **options):
    options = {"steps": 15, "batch_tokens": 512, "learning_rate": 1e-2, "held_out": 0.3, **options}
    return Calibration(ids(rows, 16), progress=False, **options)


@each_family
@pytest.mark.parametrize("config", ["2x4", "mlp:16"])
def test_calibration(family, config):
    """It explains something, and more with more steps."""
    dense = tiny_model(family)
    rate = 1e-2 if config == "2x4" else 1e-3  # an MLP starts as it should be
    report = convert(dense, config, calibration=plan(learning_rate=rate)).calibration_report
    assert list(report.unexplained) == [0, 1, 2] and report.tokens == 120 * 16
    assert report.unexplained[0] < 1
    if config == "2x4":
        assert (
            report.unexplained[0] < convert(dense, config, calibration=plan(steps=1)).calibration_report.unexplained[0]
        )


@each_family
def test_usage(family):
    fast = convert(tiny_model(family))
    told = fff_usage(fast, [batch_for(fast) | {"attention_mask": torch.ones(3, 9, dtype=torch.long)}])
    assert list(told) == ([0] if fast.family.shared else [0, 1, 2])
    assert all(0 <= one["dead"] < 1 and 0 < one["entropy"] <= one["depth"] == 3 for one in told.values())


def test_a_tokenizer_for_each_folder(tmp_path):
    convert(tiny_model("mpnet")).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("<s>\n<pad>\n</s>\n[UNK]\n<mask>\nword\n", encoding="utf-8")
    assert type(AutoTokenizer.from_pretrained(tmp_path)).__name__.startswith("MPNetTokenizer")


# --- families that are added ----------------------------------------------------------------------------------------


@pytest.fixture
def added():
    """Forgets what a test adds to the table."""
    before = set(FAMILIES)
    yield
    for model_type in set(FAMILIES) - before:
        del FAMILIES[model_type]


def test_one_row_adds_a_family(added, tmp_path):
    with pytest.raises(ValueError, match="no known feedforward networks in Data2VecTextForSequenceClassification"):
        convert(transformers.Data2VecTextForSequenceClassification(CONFIG_MAPPING["data2vec-text"](**SMALL)))
    register_family(FFNInterface("data2vec-text"))
    for name in heads("data2vec-text"):
        fast = convert(tiny_model("data2vec-text", name))
        assert type(fast) is getattr(hf_fff, f"Fast{name}") and name in ("Data2VecTextModel", *heads("data2vec-text"))
        fast.save_pretrained(tmp_path / name)
        batch = batch_for(fast)
        for auto in heads("data2vec-text")[name]:
            assert same(outputs(load_clean(auto, tmp_path / name), batch), outputs(fast, batch))
    report = convert(tiny_model("data2vec-text"), calibration=plan()).calibration_report
    assert all(v < 1 for v in report.unexplained.values())


def test_a_family_of_ones_own(added, tmp_path):
    """Neither its config nor its model is of transformers."""

    class MineConfig(BertConfig):
        model_type = "mine"

    class MineModel(BertModel):
        config_class = MineConfig

    AutoConfig.register("mine", MineConfig, exist_ok=True)
    with pytest.raises(ValueError, match="no encoder of model_type='mine': register it with AutoModel"):
        register_family(FFNInterface("mine"))
    AutoModel.register(MineConfig, MineModel, exist_ok=True)
    register_family(FFNInterface("mine"))
    fast = convert(MineModel(MineConfig(**SMALL)))
    assert type(fast) is hf_fff.FastMineModel and fast.config.model_type == "fastmine"
    fast.save_pretrained(tmp_path)
    assert same(outputs(load_clean(AutoModel, tmp_path), batch_for(fast)), outputs(fast.eval(), batch_for(fast)))


def test_a_row_that_does_not_fit(added):
    row = FFNInterface("data2vec-text", ffn_in="mlp", dense_in="mlp.up")
    register_family(row)
    with pytest.raises(
        ValueError, match=r"'data2vec-text' does not fit transformers 5\..*no 'mlp.up' in Data2VecTextLayer"
    ):
        convert(tiny_model("data2vec-text"))
    register_family(FFNInterface("data2vec-text", layers="layers"))
    with pytest.raises(ValueError, match="no 'layers' in Data2VecTextModel"):
        convert(tiny_model("data2vec-text"))


@pytest.mark.parametrize("row", [FFNInterface("not-there"), "bert", None], ids=str)
def test_what_is_no_family(row):
    with pytest.raises((ValueError, TypeError), match="no model_type='not-there'|is an FFNInterface, not"):
        register_family(row)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_decoders(head):
    model_class = getattr(transformers, head)
    config = model_class.config_class(**SMALL)
    with pytest.raises(ValueError, match=f"{head} has no fast class; of the family '{config.model_type}' there are: "):
        convert(model_class(config))
    config.is_decoder = True
    with pytest.raises(ValueError, match="is a decoder"):
        convert(tiny_model(config.model_type, is_decoder=True))


def test_encoder_and_decoder():
    config = transformers.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=50, encoder_ffn_dim=8)
    with pytest.raises(ValueError, match="BartModel is an encoder with a decoder.*ffn="):
        convert(transformers.BartModel(config))


def test_shared_layers_take_one_config(tmp_path):
    dense = tiny_model("albert")
    message = r"layers 0 to 2 of a 'albert' model share one feedforward network.*given: 0: 4x3, 1: 2x3, 2: dense"
    with pytest.raises(ValueError, match=message):
        convert(dense, {0: "4x3", 1: "2x3"})
    with pytest.raises(ValueError, match="given: 0: dense, 1: 4x3, 2: dense"):
        convert(dense, "4x3", target_layers=[1])
    two = tiny_model("albert", num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2)
    fast = convert(two, {0: "4x3", 1: "4x3", 2: "mlp:8", 3: "mlp:8"}, calibration=plan())
    assert [type(t).__name__ for t in trees(fast)] == ["FFF"] * 4 + ["MLP"] * 4
    assert len({id(t) for t in trees(fast)}) == 4
    fast.save_pretrained(tmp_path)
    assert same(outputs(load_clean(AutoModel, tmp_path), batch_for(fast)), outputs(fast, batch_for(fast)))
    with pytest.raises(ValueError, match="share one feedforward network"):
        AutoModel.from_pretrained(tmp_path, fff={0: "4x3"})


def test_projections_that_are_not_plain():
    quantised = torch.ao.quantization.quantize_dynamic(tiny_model("roberta"), {torch.nn.Linear})
    with pytest.raises(ValueError, match="'intermediate.dense' is a Linear with .* before it is quantised"):
        convert(quantised)
    adapted = tiny_model("roberta")
    torch.nn.utils.parametrizations.weight_norm(adapted.encoder.layer[1].output.dense)
    with pytest.raises(ValueError, match="'output.dense' is a ParametrizedLinear .* merge its adapters first"):
        convert(adapted)


def test_the_page_is_up_to_date():
    written = Path(__file__).resolve().parents[2] / "docs" / "families.md"
    assert written.read_text(encoding="utf-8") == page(), "run: python -m hf_fff.models.page > docs/families.md"
