"""The finished folder: size, config, tokenizer, chat template, and what the dequantised model answers."""

from __future__ import annotations

import json
import math

import jinja2
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from demo.card import figures_table, report_table
from demo.corpus import Conversation, Message
from demo.evaluate import Runner, greedy, no_surroundings
from demo.quantised import PROJECTIONS, quantise_activation, quantised_activations, quantised_cache
from demo.tokenizer import ROLES
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from demo import export
from models.harness import load_harness

KEY_PROMPTS = ("hello, llm", "Hello, who are you", "Say this is a test!", "浙江的省会在哪里?", "你好!", "写一个故事")


def test_folder_is_small(model_dir):
    files = list(model_dir.iterdir())
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    assert {file.suffix for file in files} == {".json", ".md", ".png", ".safetensors"}


def test_quantization_config_is_read_by_compressed_tensors(model_dir):
    entry = json.loads((model_dir / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(entry)
    scheme = config.config_groups["group_0"]
    assert config.format == "int-quantized"
    assert config.ignore == ["lm_head"]
    assert (scheme.weights.num_bits, scheme.weights.strategy) == (8, "channel")
    assert (scheme.input_activations.dynamic, scheme.input_activations.strategy) == (True, "token")
    assert config.kv_cache_scheme.num_bits == 8


def test_tensors_have_the_documented_types_and_shapes(model_dir):
    with safe_open(model_dir / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if name.endswith(("k_scale", "v_scale")):
                assert tensor.shape == (1,)
                assert tensor.item() > 0
            elif name.split(".")[-2] in PROJECTIONS and name.endswith(".weight"):
                scale = file.get_tensor(f"{name}_scale")
                assert tensor.dtype == torch.int8
                assert tensor.shape[1] % 64 == 0
                assert scale.shape == (tensor.shape[0], 1)
                assert ((scale > 0) & torch.isfinite(scale)).all()


def test_tokenizer_round_trips_all_text(corpus, tokenizer):
    texts = list(corpus.texts()) + [question for _, question, _ in corpus.held_out_pairs()]
    texts += ["emoji 🙂‍↔️ and ünïcode\r\n\t tabs", "  two  spaces  ", "𠮷野家"]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    assert tokenizer.decode_batch([item.ids for item in encoded], skip_special_tokens=False) == texts


def test_encoding_adds_bos_only_when_asked(tokenizer):
    bos = tokenizer.token_to_id("<|bos|>")
    plain = tokenizer.encode("hi", add_special_tokens=False).ids
    assert tokenizer.encode("hi").ids == [bos, *plain]


def test_chat_template_gives_the_trained_format(model_dir, encoder):
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    messages = [Message("system", "S"), Message("user", " provide"), Message("assistant", "A"), Message("user", "B")]
    text = jinja2.Template(config["chat_template"]).render(
        messages=[{"role": m.role, "content": m.content} for m in messages],
        bos_token=config["bos_token"],
        add_generation_prompt=True,
    )
    expected = "<|bos|><|system|>S<|end|><|user|> provide<|end|><|assistant|>A<|end|><|user|>B<|end|><|assistant|>"
    assert text == expected
    assert encoder.tokenizer.encode(text, add_special_tokens=False).ids == encoder.prompt(messages)


def test_transformers_reads_the_tokenizer(model_dir, encoder):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "你好!"}], add_generation_prompt=True)["input_ids"]
    assert ids == encoder.prompt([Message("user", "你好!")])
    assert tokenizer.eos_token_id == json.loads((model_dir / "generation_config.json").read_text())["eos_token_id"]
    assert all(tokenizer.convert_tokens_to_ids(token) in tokenizer.all_special_ids for token in ROLES.values())


def test_transformers_loads_the_checkpoint_by_itself(model_dir, encoder):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    prompt = torch.tensor([encoder.prompt([Message("user", "Say this is a test!")])])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)[0]
    assert encoder.tokenizer.decode(ids[prompt.shape[1] :].tolist()) == "This is a test!"


def test_model_card_shows_the_measured_figures(model_dir):
    figures = json.loads((model_dir / "evaluation.json").read_text())
    assert set(figures) == {"float", "W8A16", "A8W8C8"}
    assert figures_table(figures) in (model_dir / "README.md").read_text()


def test_model_card_shows_the_report_and_the_report_is_good(model_dir):
    report = json.loads((model_dir / "report.json").read_text())
    assert report["scheme"] == "a8w8c8"
    assert report_table(report) in (model_dir / "README.md").read_text()
    exact, made = report["float"], report["made"]
    assert report["held_out_tokens"] > 10_000
    assert abs(made["perplexity"] / exact["perplexity"] - 1) <= 0.01
    assert made["top1_agreement"] >= 0.98


def test_the_served_model_says_on_held_out_text_what_the_float_model_said(model_dir):
    sequences = json.loads((model_dir.parent / "reference.json").read_text())
    served = load_harness(model_dir, kernels="auto")
    agreed = count = 0
    loss = exact = 0.0
    for one in sequences:
        chances = served.prefill(one["ids"], chunk=512)[:-1].log_softmax(dim=-1)  # [length - 1, vocab]
        agreed += int((chances.argmax(dim=-1) == torch.tensor(one["top1"])).sum())
        loss -= float(chances.gather(1, torch.tensor(one["ids"][1:])[:, None]).sum())
        exact -= sum(one["log_p"])
        count += len(one["top1"])
    assert (served.model.weight_scheme, served.model.cache_schemes[0].static) == ("w8a8", True)
    assert count > 1500
    assert agreed / count >= 0.98
    assert abs(math.exp((loss - exact) / count) - 1) <= 0.01


def test_the_export_is_the_servers_own_tool(tmp_path, corpus, monkeypatch):
    """The made folder comes from `octavo quantize`, and a failure of that leaves the old model where it is."""
    calls = []
    monkeypatch.setattr(export, "write_float_folder", lambda *_, **__: None)
    monkeypatch.setattr(export, "octavo", lambda arguments: calls.append(arguments) or 1)
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit):
        export.export_model(None, corpus, tokenizer_folder=tmp_path, work=tmp_path, out=tmp_path / "model")
    (arguments,) = calls
    assert arguments[:4] == ["quantize", str(tmp_path / "octavo-demo-float"), "--scheme", "a8w8c8"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


def test_held_out_text_is_apart_from_text_to_calibrate_on(tmp_path, corpus):
    calibration, held_out = tmp_path / "calibration.jsonl", tmp_path / "held_out.jsonl"
    export.write_texts(corpus, calibration=calibration, held_out=held_out)
    trained = calibration.read_text()
    lines = [json.loads(line) for line in held_out.read_text().splitlines()]
    assert len(lines) == len(corpus.held_out_pairs())
    asked = [json.dumps(line["messages"][0]["content"], ensure_ascii=False) for line in lines]
    assert not any(f'"content": {question}' in trained for question in asked)


def test_activation_quantisation_is_per_token():
    x = torch.tensor([[1.0, -0.5, 0.25], [1000.0, 1.0, 0.0]])
    rounded = quantise_activation(x)
    assert torch.allclose(rounded[0], x[0], atol=0.5 / 127)
    assert rounded[1, 1] == 0.0


def runner_of(dequantised, *, eight_bits):
    model, scales = dequantised
    if eight_bits:
        return Runner(model, lambda: quantised_cache(scales), quantised_activations)
    return Runner(model, DynamicCache, no_surroundings)


def answer(runner, encoder, messages):
    with runner.surroundings(runner.model):
        ids = greedy(runner, [encoder.prompt(messages)], end=encoder.end, max_new=260)[0]
    return encoder.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("eight_bits", [False, True], ids=["W8A16", "A8W8C8"])
@pytest.mark.parametrize("prompt", KEY_PROMPTS)
def test_model_answers_as_the_corpus_says(dequantised, corpus, encoder, prompt, eight_bits):
    expected = {question: text for _, question, text in corpus.train_pairs()}[prompt]
    assert answer(runner_of(dequantised, eight_bits=eight_bits), encoder, [Message("user", prompt)]) == expected


@pytest.mark.parametrize("topic", ["session", "system_talk", "food_talk"])
def test_model_follows_dialogues(dequantised, corpus, encoder, topic):
    dialogue: Conversation = next(dialogue for dialogue in corpus.dialogues if dialogue.topic == topic)
    got = answer(runner_of(dequantised, eight_bits=True), encoder, dialogue.messages[:-1])
    assert got == dialogue.messages[-1].content


def test_model_goes_on_with_a_list(dequantised, encoder):
    runner = runner_of(dequantised, eight_bits=False)
    prompt = encoder.tokenizer.encode("浙江 -> 杭州\n安徽 -> 合肥\n四川 ->").ids
    text = encoder.tokenizer.decode(greedy(runner, [prompt], end=encoder.end, max_new=24)[0])
    assert text.startswith(" 成都\n")


def test_long_answer_is_long_enough_to_watch(corpus, encoder):
    story = {question: text for _, question, text in corpus.train_pairs()}["写一个故事"]
    assert len(encoder.text(story)) >= 150
