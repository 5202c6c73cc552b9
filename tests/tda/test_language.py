"""Models of transformers as problems: gradients, padding, weights in folders, adapters, parts by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tda import InputError, checkpoint
from tda.blocks import example_gradients, to_parameters
from tda.modules import inspect
from tda.problems.language import CausalLM
from tests.tda import language_models as tiny
from tests.tda.pipeline import attribute, fit, relative

MODELS = [(name, kind) for kind in ("causal", "classifier") for name in tiny.CONFIGS if kind == "classifier" or name in tiny.CAUSAL]


def problem_of(folder, name, kind, **options):
    return (tiny.causal if kind == "causal" else tiny.classifier)(folder, name=name, **options)


def opened(problem, folder, **options):
    """The problem's model with the weights of the folder, in float64, cut into blocks."""
    model = problem.model()
    problem.restore(model, checkpoint.read(f"file://{folder}"), str(folder))
    return inspect(problem, model.double(), problem.train_data(), **options)


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_gradients_in_a_padded_batch_are_autograds_one_unpadded_example_at_a_time(tmp_path, name, kind):
    problem = problem_of(tmp_path, name, kind)
    attributed = opened(problem, tmp_path / "model")
    assert not any(block.direct for block in attributed.blocks)
    assert attributed.share == 1
    data, parameters = problem.train_data(), dict(attributed.model.named_parameters())
    tape = attributed.tape(attributed.load(data, range(len(data))))
    found = {}
    for block, pairs in zip(attributed.blocks, tape.pairs(tape.seed(problem.likelihood.loss)), strict=True):
        found |= to_parameters(block, example_gradients(block, pairs))
    for i, (inputs, target) in enumerate(data):
        logits = attributed.model(input_ids=inputs["input_ids"][None]).logits
        if kind == "causal":  # the label of a token is the next one, as transformers count it
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], inputs["input_ids"][1:], reduction="sum")
        else:
            loss = torch.nn.functional.cross_entropy(logits, target[None])
        wanted = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (key, parameter), truth in zip(parameters.items(), wanted, strict=True):
            torch.testing.assert_close(found[key][i], torch.zeros_like(parameter) if truth is None else truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_a_sequences_scores_do_not_depend_on_its_batch_mates(tmp_path, name, kind):
    problem = problem_of(tmp_path, name, kind)
    attributed = opened(problem, tmp_path / "model")
    data = problem.train_data()
    factors = {"empirical": fit(attributed, data, [range(len(data))], fisher="empirical")}
    methods = [{"name": "graddot"}, {"name": "ekfac", "fisher": "empirical", "damping": 1e-2}]
    alone, together = (attribute(problem, methods, batch_size=n, attributed=attributed, factors=factors).influence for n in (1, 5))
    for one, other in zip(alone, together, strict=True):
        assert float(one.abs().max()) > 1e-3
        assert relative(one, other) < 1e-12
    assert (
        relative(fit(attributed, data, [range(5)], fisher="empirical", batch_size=1)[0].eigenvalues, factors["empirical"][0].eigenvalues)
        < 1e-10
    )


# Weights in folders.


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_a_folder_in_one_file_or_in_shards_gives_transformers_weights(tmp_path, name):
    problem = tiny.causal(tmp_path, name=name)
    tiny.save(tmp_path / "shards", name, max_shard_size="1KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    truth = tiny.drawn(tiny.CAUSAL[name], tiny.CONFIGS[name]).state_dict()
    for folder in ("model", "shards"):
        model = problem.model()
        problem.restore(model, checkpoint.read(f"file://{tmp_path / folder}"), folder)
        assert all(torch.equal(tensor, truth[key]) for key, tensor in model.state_dict().items())


def test_names_of_a_bare_base_model_are_understood_and_a_stored_training_comes_back(tmp_path):
    problem = tiny.causal(tmp_path)
    state = {k.removeprefix("transformer."): t for k, t in load_file(tmp_path / "model" / "model.safetensors").items()}
    model, again = problem.model(), problem.model()
    problem.restore(model, state, "hub")
    problem.restore(again, checkpoint.parse(checkpoint.dump(model), "store"), "store")
    truth = tiny.drawn(tiny.CAUSAL["GPT-2"], tiny.CONFIGS["GPT-2"]).state_dict()
    for found in (model, again):
        assert all(torch.equal(tensor, truth[key]) for key, tensor in found.state_dict().items())


def test_training_on_begins_with_the_folders_weights_and_training_anew_with_the_seeds(tmp_path):
    problem = tiny.causal(tmp_path, epochs=1)
    truth = tiny.drawn(tiny.CAUSAL["GPT-2"], tiny.CONFIGS["GPT-2"]).state_dict()
    assert all(torch.equal(tensor, truth[key]) for key, tensor in problem.model().state_dict().items())
    (tmp_path / "model" / "model.safetensors").unlink()
    first, second, other = (seeded(problem, seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def seeded(problem, seed):
    torch.manual_seed(seed)
    return torch.cat([p.detach().flatten() for p in problem.model().parameters()])


def test_a_classifier_trains_on_from_a_language_model_with_a_new_head(tmp_path):
    tiny.save(tmp_path / "model", "GPT-2")
    problem = tiny.classifier(tmp_path, name="GPT-2", epochs=1)
    truth = tiny.drawn(tiny.CAUSAL["GPT-2"], tiny.CONFIGS["GPT-2"]).state_dict()
    state = problem.model().state_dict()
    assert torch.equal(state["transformer.wte.weight"], truth["transformer.wte.weight"])
    with pytest.raises(InputError, match=r"does not fit the model: missing: score\.weight"):
        problem.restore(problem.model(), checkpoint.read(f"file://{tmp_path / 'model'}"), "there")


# Parts by name.


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_mlp_and_attention_are_parts_of_every_architecture_and_norms_of_neither(tmp_path, name):
    problem = tiny.classifier(tmp_path, name=name)
    chosen = {
        part: {n for b in opened(problem, tmp_path / "model", modules=[part]).blocks for n in b.parameters} for part in ("mlp", "attention")
    }
    every = set(dict(problem.model().named_parameters()))
    inside = {n for n in every if ".0." in n and "norm" not in n.lower() and "ln_" not in n}
    assert chosen["mlp"] | chosen["attention"] == inside
    assert not chosen["mlp"] & chosen["attention"]
    widths = {torch.Size((8, 12)), torch.Size((12, 8)), torch.Size((8, 32)), torch.Size((32, 8))}
    shapes = {n: p.shape for n, p in problem.model().named_parameters()}
    assert {n for n in inside if shapes[n] in widths} == {n for n in chosen["mlp"] if len(shapes[n]) == 2}
    left = {n for b in opened(problem, tmp_path / "model", exclude=["mlp"]).blocks for n in b.parameters}
    assert left == every - chosen["mlp"]


# Adapters.


def save_adapter(folder, base, name="Llama", **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    targets = {"Llama": ["q_proj", "down_proj"], "GPT-2": ["c_attn", "c_fc"], "BERT": ["query", "value"]}[name]
    with pytest.warns(FutureWarning):
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "GPT-2", **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_of_a_model_with_an_adapter_the_adapters_parameters_alone_are_attributed(tmp_path, name):
    truth = save_adapter(tmp_path / "adapter", tiny.drawn(tiny.CAUSAL[name], tiny.CONFIGS[name]), name)
    problem = tiny.causal(tmp_path, name=name, adapter=str(tmp_path / "adapter"))
    attributed = opened(problem, tmp_path / "model")
    names = {n for b in attributed.blocks for n in b.parameters}
    assert names == {n for n, p in truth.named_parameters() if p.requires_grad}
    assert not any(block.direct for block in attributed.blocks)
    inputs = problem.train_data()[0][0]["input_ids"][None]
    torch.testing.assert_close(attributed.model(input_ids=inputs).logits, truth.double()(input_ids=inputs).logits)
    again = problem.model()
    problem.restore(again, checkpoint.parse(checkpoint.dump(attributed.model), "store"), "store")
    assert all(torch.equal(t, attributed.model.state_dict()[key].float()) for key, t in again.state_dict().items())


def test_an_adapter_may_bring_the_head_that_its_base_lacks(tmp_path):
    base = tiny.drawn(tiny.CLASSIFIERS["BERT"], tiny.CONFIGS["BERT"])
    truth = save_adapter(tmp_path / "adapter", base, "BERT", task_type="SEQ_CLS")
    problem = tiny.classifier(tmp_path, adapter=str(tmp_path / "adapter"))
    state = {k: t for k, t in load_file(tmp_path / "model" / "model.safetensors").items() if not k.startswith("classifier")}
    model = problem.model()
    problem.restore(model, state, "base")
    inputs = problem.train_data()[0][0]["input_ids"][None]
    torch.testing.assert_close(model(input_ids=inputs).logits, truth(input_ids=inputs).logits)


def test_an_adapter_without_its_base_or_of_another_is_refused_by_name(tmp_path):
    save_adapter(tmp_path / "adapter", tiny.drawn(tiny.CAUSAL["Llama"], tiny.CONFIGS["Llama"]))
    data = tiny.lines(tmp_path / "d.jsonl", tiny.TEXTS)
    with pytest.raises(InputError, match=r"adapter is a PEFT adapter without its base; give the base's folder as `checkpoint`"):
        CausalLM(str(tmp_path / "adapter"), data, data)
    with pytest.raises(InputError, match=r"adapter is a PEFT adapter without its base"):
        checkpoint.read(f"file://{tmp_path / 'adapter'}")
    problem = tiny.causal(tmp_path, name="GPT-2", adapter=str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="adapter does not fit the base GPT2LMHeadModel"):
        problem.model()
    problem = tiny.causal(tmp_path)
    with pytest.raises(InputError, match=r"is a PEFT adapter without its base; give the base here and this as problem_options\.adapter"):
        problem.restore(problem.model(), load_file(tmp_path / "adapter" / "adapter_model.safetensors"), "there")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        tiny.causal(tmp_path, adapter=str(tmp_path / "adapter")).model()


# What is refused.


def test_a_checkpoint_of_another_architecture_is_refused_with_names(tmp_path):
    problem = tiny.causal(tmp_path)
    with pytest.raises(InputError, match=r"missing: .*transformer\.h\.0.* and \d+ more; unknown: .*gpt_neox.* and \d+ more") as error:
        problem.restore(problem.model(), checkpoint.read(f"file://{tiny.save(tmp_path / 'other', 'GPT-NeoX')}"), "there")
    assert "\n" not in str(error.value)
    wrong = {k: t[..., :5].contiguous() for k, t in load_file(tmp_path / "model" / "model.safetensors").items()}
    with pytest.raises(InputError, match="instead of"):
        problem.restore(problem.model(), wrong, "there")


def test_pickles_and_folders_without_weights_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        checkpoint.read(f"file://{tmp_path}")
    with pytest.raises(InputError, match="is a pickle, which is never read"):
        checkpoint.read(f"file://{tmp_path}/pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"holds no model\.safetensors; it has notes\.txt"):
        checkpoint.read(f"file://{tmp_path}")
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.read(f"file://{tmp_path}/none")


def test_a_folder_that_lost_a_shard_or_a_tensor_is_refused(tmp_path):
    folder = tiny.save(tmp_path / "model", "GPT-2", max_shard_size="1KB")
    shards = sorted(folder.glob("*.safetensors"))
    state = load_file(shards[0])
    lost = min(state)
    save_file({k: t for k, t in state.items() if k != lost} or {"other": torch.zeros(1)}, shards[0])
    with pytest.raises(InputError, match=f"lacks tensors that its index names: {lost}"):
        checkpoint.read(f"file://{folder}")
    shards[0].unlink()
    with pytest.raises(InputError, match=f"lacks {shards[0].name}"):
        checkpoint.read(f"file://{folder}")


def test_a_model_that_looks_ahead_is_no_causal_language_model(tmp_path):
    tiny.save(tmp_path / "model", "BERT", tiny.CLASSIFIERS)
    with pytest.raises(InputError, match="bert that looks ahead"):
        tiny.causal(tmp_path).model()


def test_folders_that_are_none_are_refused(tmp_path):
    data = tiny.lines(tmp_path / "d.jsonl", tiny.TEXTS)
    for folder, said in (("none", "is no folder"), ("s3://bucket/model", "is not on a disk"), (".", "has no config.json")):
        with pytest.raises(InputError, match=said):
            CausalLM(folder if folder.startswith("s3") else str(tmp_path / folder), data, data)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(InputError, match="of no architecture that can be read"):
        CausalLM(str(tmp_path), data, data)
