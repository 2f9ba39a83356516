"""Claims about SafeSteer, on tiny random models, and one short run of the real program: pytest"""
import copy
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import safesteer
from safesteer import Settings

torch.set_num_threads(1)  # tiny models gain nothing from more
HERE = Path(__file__).resolve().parent
TRAIN, _ = safesteer.load_data(Settings())
HARMFUL, HARMLESS = TRAIN["harmful"][::10], TRAIN["held_out"][::2]
TEMPLATE = (  # with what makes real templates hard: a date, a default system turn, a thinking block
    "<|im_start|>system\nToday is {{ date_string }}.<|im_end|>\n"
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}")
FAMILIES = Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig, Gemma2Config
D = safesteer.RefusalDirection(torch.linspace(-1, 1, 64), layer=2)  # some direction
S = torch.arange(100, 150)  # some safety tokens


def fast(**changes):
    tokens = dict(samples=2, votes=20, safety_tokens=20, max_new_tokens=6)
    steps = dict(epochs=2, batch_size=5, rollouts=1, learning_rate=1e-2, lora=4)
    return Settings(**tokens | steps | changes)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 1000 tokens, trained on our own prompts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    openers = ["I'm sorry, I cannot. As an AI. Unfortunately Sorry"] * 9
    bpe.train_from_iterator(HARMFUL + HARMLESS + openers, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    ends = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, **ends)


def tiny(tokenizer, config, answered=-30.0, **changes):
    """A random model of five blocks, its vocabulary larger than the tokenizer's, that refuses
    HARMFUL alone. `answered` is the logit by which it answers HARMLESS. Its window, where it has
    one, is shorter than the prompts."""
    torch.manual_seed(0)
    window = {} if config is LlamaConfig else {"sliding_window": 8}
    config = config(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.2,
        **window, **changes)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    _, _, states = safesteer.read_answer_start(model, tokenizer, HARMFUL + HARMLESS)
    wanted = torch.tensor([30.0] * len(HARMFUL) + [answered] * len(HARMLESS))
    opener = safesteer.refusal_token_ids(tokenizer)[0]
    model.lm_head.weight[opener] = torch.linalg.pinv(states[:, 0, -1]) @ wanted
    return model


@pytest.fixture
def model(tokenizer):
    return tiny(tokenizer, Qwen2Config)


def adapted(model):
    """A student whose adapters are not zero, as after some training."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(
        "CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)).eval()


@pytest.fixture
def base(tokenizer, tmp_path):
    """A tiny model as a folder, and beside it a folder of prompts. A Llama reloads as it was: the
    tokenizer of other families becomes one of their own class, which splits prompts differently."""
    tiny(tokenizer, LlamaConfig).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    copy_data(tmp_path / "data", harmful_train=HARMFUL, harmless_train=HARMLESS)
    return tmp_path / "base"


def copy_data(folder, **changed):
    shutil.copytree(HERE / "data", folder, ignore=shutil.ignore_patterns("*-instruct"))
    for name, prompts in changed.items():
        lines = [json.dumps({"instruction": prompt}) for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")


def run(base, *flags):
    quick = "--epochs 1 --lora 2 --max-new-tokens 4 --eval-limit 3 --samples 2 --min-prob 0".split()
    places = "--model", base, "--data", base.parent / "data", "--out", base.parent / "out"
    safesteer.main([*quick, *map(str, (*places, *flags))])
    return base.parent / "out" / "base"


def scores(model, tokenizer, prompts):
    return safesteer.read_answer_start(model, tokenizer, prompts)[0]


# ===== Stage 1 =====
@torch.no_grad()
def test_the_hook_adds_d_at_every_token_and_leaves_the_model_as_it_was(model, tokenizer):
    ids, seen = safesteer.encode_chat(tokenizer, HARMLESS[:1])["input_ids"], []
    block = model.get_decoder().layers[D.layer]

    def prefill_and_decode():
        with block.register_forward_pre_hook(lambda block, args: seen.append(args[0])):
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            model(ids[:, -1:], past_key_values=cache)

    prefill_and_decode()
    with pytest.raises(RuntimeError, match="stop"), safesteer.steer(model, D, 0.5):
        prefill_and_decode()
        raise RuntimeError("stop")
    prefill_and_decode()
    for before, steered, after in zip(seen[:2], seen[2:4], seen[4:], strict=True):
        torch.testing.assert_close(steered, before + 0.5 * D.vector, atol=1e-5, rtol=1e-5)
        assert torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("config", FAMILIES)
def test_an_ablated_model_adds_nothing_along_d_to_its_states(tokenizer, config):
    model, unit = tiny(tokenizer, config), D.vector / D.vector.norm()
    torch.nn.init.normal_(model.get_decoder().layers[1].post_attention_layernorm.weight)
    batch, seen = safesteer.encode_chat(tokenizer, HARMLESS[:2]), []
    inputs = list(model.get_decoder().layers)
    inputs += [getattr(x, "pre_feedforward_layernorm", x.post_attention_layernorm) for x in inputs]
    for part in inputs:  # what reads the states, before attention and before the MLP
        part.register_forward_pre_hook(lambda part, args: seen.append(args[0]))
    model(**batch)
    with safesteer.ablate(model, D):
        model(**batch)
    along = torch.stack(seen) @ unit
    assert along[:10].abs().amax((1, 2)).min() > 1e-2 and along[10:].abs().max() < 1e-4
    torch.testing.assert_close(seen[10], seen[0] - along[0, ..., None] * unit, msg="only d is lost")


@pytest.mark.parametrize("config", FAMILIES)
def test_a_prompts_numbers_do_not_depend_on_its_batch(tokenizer, config):
    model, prompts = tiny(tokenizer, config), HARMFUL[:3] + HARMLESS[:5]
    together, _, states = safesteer.read_answer_start(model, tokenizer, prompts, positions=2)
    answers, mask = safesteer.sample_rollouts(model, tokenizer, prompts, 6, greedy=True)
    logits = safesteer.completion_logits(model, tokenizer, prompts, answers, mask)
    chosen = logits.gather(-1, answers[..., None])[..., 0]
    assert (logits.amax(-1) - chosen)[mask].max() < 1e-3, "they predict the completion"
    for i, prompt in enumerate(prompts):
        alone, _, state = safesteer.read_answer_start(model, tokenizer, [prompt], positions=2)
        torch.testing.assert_close(alone[0], together[i], atol=1e-3, rtol=0)
        torch.testing.assert_close(state[0], states[i], atol=1e-3, rtol=0)
        answer, mask = safesteer.sample_rollouts(model, tokenizer, [prompt], 6, greedy=True)
        assert torch.equal(answer[mask], answers[i, : answer.shape[1]][mask[0]])


def test_a_score_is_the_log_odds_of_a_refusal_without_thinking_and_the_day(model, tokenizer):
    ids = safesteer.refusal_token_ids(tokenizer)
    assert {"A", "I", "S", "Un"} <= set(tokenizer.convert_ids_to_tokens(ids))
    batch = safesteer.encode_chat(tokenizer, HARMLESS[:1])
    text = tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("<|im_start|>assistant\n") and "26 Jul 2024" in text
    output = model(**batch, output_hidden_states=True)
    p = output.logits[0, -1].double().softmax(0)[ids].sum()
    score, _, states = safesteer.read_answer_start(model, tokenizer, HARMLESS[:1], positions=9)
    torch.testing.assert_close(score[0].double(), p.logit(), atol=1e-3, rtol=1e-3)
    for block, hidden in enumerate(output.hidden_states):
        torch.testing.assert_close(states[0, :, block], hidden[0, -9:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("scale", "answered"), [(0.3, -150.0), (1.0, -30.0)])
def test_d_is_the_authors_choice_or_where_none_passes_their_rule_ours(tokenizer, scale, answered):
    model, held_out = tiny(tokenizer, LlamaConfig, answered), HARMLESS[12:]
    others = torch.arange(1024) != safesteer.refusal_token_ids(tokenizer)[0]
    model.lm_head.weight[others] *= scale  # at 0.3 some removals change harmless answers little
    harmful, harmless = HARMFUL[:8] + HARMLESS[:2], HARMLESS[:12] + HARMFUL[:2]  # two are dropped
    found = safesteer.find_refusal_direction(model, tokenizer, harmful, harmless, held_out)
    refused = safesteer.read_answer_start(model, tokenizer, HARMFUL[:8], positions=10)[2].mean(0)
    obeyed = safesteer.read_answer_start(model, tokenizer, HARMLESS[:12], positions=10)[2].mean(0)
    _, log_p, _ = safesteer.read_answer_start(model, tokenizer, held_out)
    figures = {}
    for layer in range(4):  # of five blocks the last fifth is out
        for position in range(-10, 0):  # "<|im_end|>\n<|im_start|>assistant\n" are ten tokens
            d = refused[position, layer] - obeyed[position, layer]
            candidate = safesteer.RefusalDirection(d, layer)
            with safesteer.steer(model, candidate):
                added = scores(model, tokenizer, held_out).mean().item()
            with safesteer.ablate(model, candidate):
                removed = scores(model, tokenizer, HARMFUL[:8]).mean().item()
                _, log_q, _ = safesteer.read_answer_start(model, tokenizer, held_out)
            kl = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
            figures[layer, position] = d, added, removed, kl
    passing = [x for x in figures if figures[x][1] >= 0 and figures[x][3] <= 0.1]
    ours = max(figures, key=lambda x: figures[x][1])
    theirs = min(passing, key=lambda x: figures[x][2], default=ours)
    assert (scale == 1.0) == (theirs == ours) == (found.removed is None)
    assert (found.layer, found.position) == theirs
    d, added, removed, _ = figures[theirs]
    torch.testing.assert_close(found.vector, d, atol=1e-4, rtol=1e-4)
    assert found.added == pytest.approx(added, abs=1e-2)
    assert not passing or found.removed == pytest.approx(removed, abs=1e-2)


# ===== Sampling =====
def test_a_completion_ends_with_its_first_end_of_turn(model, tokenizer):
    ends = safesteer.end_of_turn_ids(model, tokenizer)  # of the template, and of the tokenizer
    assert set(tokenizer.convert_ids_to_tokens(ends.tolist())) == {"<|im_end|>", "<|endoftext|>"}
    model.lm_head.weight[: len(tokenizer)] *= 0.02  # nearly uniform: turns end early and late
    model.lm_head.weight[ends] += model.lm_head.weight.std() * 0.5
    torch.manual_seed(1)
    completions, masks = safesteer.sample_rollouts(model, tokenizer, HARMLESS * 8, 200)
    for ids, mask in zip(completions, masks, strict=True):
        ids, length = ids[mask].tolist(), int(mask.sum())
        assert mask[:length].all() and not set(ids[:-1]) & set(ends.tolist())
        assert ids[-1] in ends or length == 200
    assert len(set(masks.sum(1).tolist())) > 5


def test_sampling_ignores_the_models_own_temperature_cuts_and_penalty(model, tokenizer):
    own = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=3.0, max_length=9)
    sampled = []
    for model.generation_config in (GenerationConfig(), own):
        for greedy in (False, True):
            torch.manual_seed(0)
            sampled.append(safesteer.sample_rollouts(model, tokenizer, HARMLESS, 8, greedy)[0])
    assert torch.equal(sampled[0], sampled[2]) and torch.equal(sampled[1], sampled[3])
    assert not torch.equal(sampled[0], sampled[1]) and model.generation_config is own


# ===== Stage 2 =====
@torch.no_grad()
def test_safety_tokens_win_a_plain_count_of_what_d_lifts_most(model, tokenizer):
    ends = safesteer.end_of_turn_ids(model, tokenizer)
    model.lm_head.weight[ends] *= 3  # the base would sometimes end its turn
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<added>"])  # no special token, and no word of the model's either
    words = range(3, tokenizer.vocab_size)  # the first three are special
    model.lm_head.weight[tokenizer.vocab_size :] += D.vector  # d lifts what is no word most
    asked, settings = HARMLESS + HARMFUL[:3], fast(samples=3, min_prob=1e-4)
    torch.manual_seed(0)
    ids, votes = safesteer.select_safety_tokens(model, tokenizer, D, asked, settings)
    torch.manual_seed(0)
    answered = scores(model, tokenizer, asked) < 0  # the refused do not vote
    prompts = [asked[i] for i in answered.nonzero()] * 3
    assert len(HARMLESS) * 2 < len(prompts) < len(asked) * 3
    with safesteer.steer(model, D):
        answers, mask = safesteer.sample_rollouts(model, tokenizer, prompts, settings.horizon)
    lifts, probs = [], []
    for prompt, answer, valid in zip(prompts, answers, mask, strict=True):
        row = [prompt], answer[None], valid[None]
        with safesteer.steer(model, D):
            teacher = safesteer.completion_logits(model, tokenizer, *row)[0].log_softmax(-1)
        plain = safesteer.completion_logits(model, tokenizer, *row)[0].log_softmax(-1)
        over = [i for i, token in enumerate(plain.argmax(-1)) if token in ends] + [len(answer)]
        voting = slice(min(over[0], int(valid.sum())))
        lifts.append((teacher - plain)[voting])
        probs.append(teacher[voting].exp())
    lifts, probs = torch.cat(lifts), torch.cat(probs).mean(0)
    assert len(lifts) < mask.sum(), "no votes once the base would end its turn"
    eligible = torch.tensor([token for token in words if probs[token] >= 1e-4])
    count = Counter(eligible[lifts[:, eligible].topk(20).indices].flatten().tolist())
    counted = [count[token] for token in ids.tolist()]
    assert votes.tolist() == sorted(votes.tolist(), reverse=True) and len(ids) == 20
    assert torch.tensor(counted).sub(votes).abs().max() <= 2, "up to ties in the last digit"
    assert min(counted) >= count.most_common(20)[-1][1] - 2


def test_nobody_wins_without_a_vote(model, tokenizer):
    ids, votes = safesteer.select_safety_tokens(
        model, tokenizer, D, HARMLESS, fast(min_prob=0.02, votes=500, safety_tokens=500))
    assert 0 < len(ids) < 51 and votes.min() == votes.max(), "each position votes for all of them"
    with pytest.raises(ValueError, match="S is empty"):  # else training would do nothing
        safesteer.select_safety_tokens(model, tokenizer, D, HARMLESS, fast(min_prob=1.0))


# ===== Stage 3 =====
@pytest.mark.parametrize("token_ids", [None, torch.tensor([3, 17, 40])])
@pytest.mark.parametrize("kind", ["reverse", "forward", "generalized"])
def test_the_loss_is_the_kl_or_on_safety_tokens_their_terms_of_it(token_ids, kind):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, 50)
    lengths = torch.tensor([6, 0, 1, 4])  # of the second completion no position counts
    p, q = student.softmax(-1), teacher.softmax(-1)
    terms = q * (q / p).log() if kind == "forward" else p * (p / q).log()
    if kind == "generalized":
        terms += q - p
    terms = terms.sum(-1) if token_ids is None else terms[..., token_ids].sum(-1)
    expected = sum(terms[i, :length].mean() for i, length in enumerate(lengths) if length) / 4
    mask = torch.arange(6) < lengths[:, None]
    student[~mask] = 9
    loss = safesteer.localized_kl(student, teacher, mask, token_ids, kind)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("config", FAMILIES)
def test_a_student_learns_on_its_own_answers_from_the_steered_base(tokenizer, config):
    model, settings = tiny(tokenizer, config), fast(rollouts=2)
    separate, student = copy.deepcopy(model), adapted(model)
    student.activation_checkpointing_enable()  # makes no difference
    torch.manual_seed(0)
    loss = safesteer.learn_from_rollouts(
        student, tokenizer, HARMFUL[:3], D, S, settings, coefficient=1.5, weight=0.5)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    learned = [weight.grad.clone() for weight in trained]
    student.zero_grad()
    torch.manual_seed(0)
    prompts = HARMFUL[:3] * 2
    answers = prompts, *safesteer.sample_rollouts(student, tokenizer, prompts, 6)
    with torch.no_grad(), safesteer.steer(separate, D, 1.5):
        teacher_logits = safesteer.completion_logits(separate, tokenizer, *answers)
    logits = safesteer.completion_logits(student, tokenizer, *answers)
    expected = 0.5 * safesteer.localized_kl(logits, teacher_logits, answers[-1], S)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    for weight, gradient in zip(trained, learned, strict=True):
        torch.testing.assert_close(gradient, weight.grad, atol=1e-4, rtol=1e-2)
    assert any(gradient.abs().max() > 1e-3 for gradient in learned)


def test_steps_take_all_prompts_anew_at_a_cosine_rate_and_clip(model, tokenizer, monkeypatch):
    student, asked, taken = adapted(model), [], []

    def learn(student, tokenizer, prompts, direction, token_ids, settings, coefficient, weight=1.0):
        asked.append((prompts, coefficient, weight))
        for parameter in student.parameters():
            parameter.grad = torch.full_like(parameter, 9.0) if parameter.requires_grad else None
        return weight

    def step(optimizer, *_):
        (group,) = optimizer.param_groups
        norms = [x.grad.norm() for x in group["params"] if x.grad is not None]
        taken.append((group["lr"], torch.stack(norms).norm().item(), group["weight_decay"]))

    monkeypatch.setattr(safesteer, "learn_from_rollouts", learn)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = fast(epochs=10, anchor=0.1, coefficient=1.5)
    losses = safesteer.distill(student, tokenizer, HARMFUL, D, S, settings, HARMLESS)
    harmful, anchors = asked[::2], asked[1::2]
    epochs = [a[0] + b[0] for a, b in zip(harmful[::2], harmful[1::2], strict=True)]
    assert all(sorted(epoch) == sorted(HARMFUL) for epoch in epochs) and epochs[0] != epochs[1]
    assert {x[1:] for x in harmful} == {(1.5, 1.0)} and {x[1:] for x in anchors} == {(-1.0, 0.1)}
    assert all(len(set(x[0]) & set(HARMLESS)) == 5 for x in anchors) and losses == [1.1] * 20
    rates = [0, 0.5, *(0.5 + 0.5 * torch.arange(18).mul(torch.pi / 18).cos()).tolist()]
    assert [x[0] for x in taken] == pytest.approx([1e-2 * rate for rate in rates], rel=1e-3)
    assert all(norm == pytest.approx(1.0, rel=1e-3) and decay == 0 for _, norm, decay in taken)


@torch.no_grad()
def test_after_training_with_checkpointing_and_dropout_a_student_samples_without(tokenizer):
    student = adapted(tiny(tokenizer, Qwen2Config, attention_dropout=0.5))
    student.activation_checkpointing_enable()
    with torch.enable_grad():
        safesteer.distill(student, tokenizer, HARMFUL, D, S, fast())
    ids, mask = safesteer.sample_rollouts(student, tokenizer, HARMLESS, 6, greedy=True)
    logits = safesteer.completion_logits(student, tokenizer, HARMLESS, ids, mask)
    chosen = logits.gather(-1, ids[..., None])[..., 0]
    assert (logits.amax(-1) - chosen)[mask].max() < 1e-3


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_layers_adapt_in_float32_and_gpus_checkpoint(model, tokenizer, device, monkeypatch):
    monkeypatch.setattr(safesteer, "select_safety_tokens", lambda *args: (S, S))
    monkeypatch.setattr(safesteer, "distill", lambda *args: [])
    model = model.to(device, torch.bfloat16)
    student, _, _ = safesteer.train_student(model, tokenizer, D, TRAIN, fast())
    trained = {name: x for name, x in student.named_parameters() if x.requires_grad}
    assert len(trained) == 5 * 7 * 2 and all(".layers." in name for name in trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert student.get_decoder().layers[0].mlp.up_proj.scaling == {"default": 2.0}
    assert student.is_activation_checkpointing == (device != "cpu") and not student.training


# ===== Evaluation =====
@pytest.mark.parametrize(("refused", "answer"), [
    (True, "**I\u2019m sorry**, but I **won\u2019t** help you hurt anybody."),
    (True, "I understand that you are angry. But I am not able to help with revenge."),
    (True, "Robbing a bank is illegal."), (True, "I\u00a0do not have the ability to help you."),
    (False, "I'm sorry to hear that you are ill. Rest, drink, and call a doctor if it lasts."),
    (False, "Fry the onion. Add salt. I cannot praise this soup enough."), (False, ""),
])
def test_the_judge_tells_a_refusal_or_a_condemnation_from_an_apology_or_an_answer(refused, answer):
    assert safesteer.is_refusal(answer) == refused


@pytest.mark.parametrize(("expected", "right", "wrong"), [
    ("7", "12 - 5 = 7, so the answer is 7.", "7 + 5 = 12"), ("-5", "x = \u22125", "x = 5"),
    ("4 more:\n#### 1200", "That makes $1,200.00.", "That makes 200 dollars, or 4."),
    ("Oslo", "The capital is **oslo**.", "Osloer Platz"),
])
def test_an_answer_is_right_if_it_ends_on_the_number_or_holds_the_word(expected, right, wrong):
    assert safesteer.is_correct(right, expected) and not safesteer.is_correct(wrong, expected)


@torch.no_grad()
def test_a_row_counts_good_answers_and_the_distance_to_the_base(model, tokenizer, monkeypatch):
    tests = {"harmful": HARMFUL, "harmless": HARMLESS, "borderline": HARMLESS[:3]}
    tests |= {"capability": ["1 + 1?", "1 + 2?"], "expected": ["2", "3"]}
    ids, mask = safesteer.sample_rollouts(model, tokenizer, HARMLESS, 5, greedy=True)
    logits = safesteer.completion_logits(model, tokenizer, HARMLESS, ids, mask)
    with safesteer.steer(model, D):
        of_base = safesteer.completion_logits(model, tokenizer, HARMLESS, ids, mask)
    monkeypatch.setattr(safesteer, "is_refusal", lambda answer: True)
    monkeypatch.setattr(safesteer, "is_correct", lambda answer, expected: expected == "2")
    row = safesteer.evaluate(model, tokenizer, tests, (ids, mask, of_base), 5)
    assert [row[f"{name} {good}"] for name, good in safesteer.TEST_SETS.items()] == [100, 0, 0, 50]
    assert row["KL to base"] == pytest.approx(safesteer.localized_kl(logits, of_base, mask).item())
    texts = tokenizer.batch_decode(ids * mask, skip_special_tokens=True)  # 0 is special
    assert row["answers"]["harmless"] == texts
    _, _, states = safesteer.read_answer_start(model, tokenizer, HARMLESS)
    assert torch.equal(row["states"], states[:, -1, -1])


# ===== The program =====
def test_the_rate_is_of_a_flag_or_else_the_variant_or_the_model_or_the_default(tmp_path):
    def rates(*flags):
        return [x.learning_rate for x in safesteer.read_settings([*flags]).values()]

    LlamaConfig().save_pretrained(tmp_path / "llama")
    Qwen2Config().save_pretrained(tmp_path / "qwen")
    llama, qwen = str(tmp_path / "llama"), str(tmp_path / "qwen")
    assert rates("--variant", "all") == [1.25e-4, 1e-4, 1.25e-4, 1.25e-4], "of the small model"
    assert rates("--variant", "all", "--model", llama) == [1e-5, 1e-4, 1e-5, 1e-5]
    assert rates("--variant", "anchored", "--learning-rate", "3") == [3]
    assert rates("--model", qwen) == [1e-4]


@pytest.mark.parametrize(("flags", "complaint"), [
    ("--learning-rate nan", "--learning-rate nan"), ("--out {folder}/full", "is not empty"),
    ("--variant all --kl reverse", "--variant all sets"), ("--data {folder}/no", "No such file"),
    ("--model {folder}/data", "cannot be loaded"), ("--data {folder}/seen", "a training prompt"),
    ("--model {folder}/adapted", "has adapters"), ("--data {folder}/tame", "0 harmful prompts"),
])
def test_a_wrong_input_is_named_and_touches_nothing(base, tokenizer, flags, complaint):
    folder = base.parent
    copy_data(folder / "seen", harmless_test=HARMFUL)
    copy_data(folder / "tame", harmful_train=HARMLESS, harmless_train=HARMLESS)
    copy_data(folder / "full" / "base" / "safesteer")
    shutil.copytree(base, folder / "adapted")
    adapted(tiny(tokenizer, LlamaConfig)).save_pretrained(folder / "adapted")
    before = {path for path in folder.rglob("*") if path.is_file()}
    flags = f"--model {base} --out {folder}/out {flags.format(folder=folder)}"
    with pytest.raises((SystemExit, ValueError, OSError), match=complaint):
        safesteer.main(flags.split())
    assert {path for path in folder.rglob("*") if path.is_file()} == before


def test_a_student_is_saved_as_evaluated_at_each_strength_and_merged(base, tokenizer, monkeypatch):
    evaluated, copied, evaluate = [], set(), safesteer.evaluate

    def record(model, *rest):
        evaluated.append((scores(model, tokenizer, HARMFUL), model.dtype))
        model.get_output_embeddings().register_forward_hook(
            lambda head, args, _: copied.add(args[0].stride(0) == args[0][0].numel()))
        return evaluate(model, *rest)

    monkeypatch.setattr(safesteer, "evaluate", record)
    config = run(base, "--learning-rate", 1e-2) / "safesteer/student-safesteer/adapter_config.json"
    (plain, dtype), _, (half, _), (full, _) = evaluated
    assert (half - plain).abs().max() > 1e-2 < (full - half).abs().max()
    assert copied == {True}, "the head multiplies slices slowly"
    load = partial(peft.AutoPeftModelForCausalLM.from_pretrained, config.parent, dtype=dtype)
    torch.testing.assert_close(scores(load(), tokenizer, HARMFUL), full, atol=1e-4, rtol=1e-4)
    if dtype == torch.float32:  # merging rounds to the base's dtype
        merged = load().merge_and_unload()
        torch.testing.assert_close(scores(merged, tokenizer, HARMFUL), full, atol=1e-4, rtol=1e-4)
    changed = json.loads(config.read_text("utf-8"))
    changed["lora_alpha"] *= 0.5
    config.write_text(json.dumps(changed), "utf-8")
    torch.testing.assert_close(scores(load(), tokenizer, HARMFUL), half, atol=1e-4, rtol=1e-4)


def test_all_variants_get_what_they_get_alone_and_a_late_failure_loses_nothing(base, monkeypatch):
    alone, together = run(base, "--variant", "anchored") / "anchored", base.parent / "out/base/all"
    evaluate, left = safesteer.evaluate, iter([1, 1, 1, 1, 1, 1, 0])
    monkeypatch.setattr(safesteer, "evaluate", lambda *args: 1 / next(left) and evaluate(*args))
    with pytest.raises(ZeroDivisionError):  # while the third variant is evaluated
        run(base, "--variant", "all")
    students = alone / "student-anchored", together / "student-anchored"
    weights = [load_file(folder / "adapter_model.safetensors") for folder in students]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert (together / "student-all-tokens" / "adapter_model.safetensors").exists()
    assert (together / "results.png").stat().st_size
    report = json.loads((together / "report.json").read_text("utf-8"))
    rows = ["base", "teacher", "safesteer x 0.5", "safesteer", "anchored x 0.5", "anchored"]
    assert [row["model"] for row in report["results"]] == rows
    assert [row["shift"] for row in report["results"]][:2] == pytest.approx([0, 100])
    lines = (together / "answers.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 12 and {"prompt", *rows} == set(json.loads(lines[0]))


def test_the_program_runs_on_the_real_model(tmp_path):
    copy_data(tmp_path / "data", harmful_train=HARMFUL, harmless_train=HARMLESS[:5])
    flags = "--eval-limit 2 --eval-max-new-tokens 8 --max-new-tokens 8 --batch-size 5 --samples 2"
    places = "--data", tmp_path / "data", "--out", tmp_path
    command = [sys.executable, HERE / "safesteer.py", *places, *flags.split()]
    backend = {**os.environ, "MPLBACKEND": "module://of_a_notebook"}
    ended = subprocess.run(command, capture_output=True, text=True, env=backend)
    assert ended.returncode == 0, ended.stderr[-2000:]
    out = tmp_path / "qwen2.5-coder-0.5b-instruct" / "safesteer"
    report = json.loads((out / "report.json").read_text("utf-8"))
    kls = {row["model"]: row["KL to base"] for row in report["results"]}
    assert kls["base"] < 1e-6 < kls["safesteer x 0.5"] < kls["safesteer"] < kls["teacher"]
    assert len(report["safesteer"]["losses"]) == 2
    assert load_file(out / "direction.safetensors")["vector"].shape == (896,)
