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
from peft.helpers import rescale_adapter_scale
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen3Config

import safesteer
from safesteer import Settings

torch.set_num_threads(1)  # tiny models gain nothing from more
HERE = Path(__file__).resolve().parent
DATA = {
    path.stem: [json.loads(line)["instruction"] for line in path.read_text("utf-8").splitlines()]
    for path in (HERE / "data").glob("*.jsonl")}
HARMFUL, HARMLESS = DATA["harmful_train"][::10], DATA["harmless_train"][::10]
TEMPLATE = (  # with what makes real templates hard: a date, a default system turn, a thinking block
    "<|im_start|>system\nToday is {{ date_string }}.<|im_end|>\n"
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}")
TRAINER = partial(
    trainers.BpeTrainer, vocab_size=1000, show_progress=False,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
FAMILIES = Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig, Gemma2Config
S = torch.arange(100, 150)  # some safety tokens


def fast(**changes):
    return Settings(**dict(
        epochs=2, batch_size=5, rollouts=1, max_new_tokens=6, samples=2, votes=20, lora=4,
        safety_tokens=20, learning_rate=1e-2) | changes)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 1000 tokens, trained on our own prompts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    openers = ["I'm sorry, I cannot. As an AI. Unfortunately Sorry"] * 9
    bpe.train_from_iterator(HARMFUL + HARMLESS + openers, TRAINER())
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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.requires_grad_(False)
    _, _, states = safesteer.read_answer_start(model, tokenizer, HARMFUL + HARMLESS)
    wanted = torch.tensor([30.0] * len(HARMFUL) + [answered] * len(HARMLESS))
    opener = safesteer.refusal_token_ids(tokenizer)[0]
    model.lm_head.weight[opener] = torch.linalg.pinv(states[:, 0, -1]) @ wanted
    return model


@pytest.fixture
def model(tokenizer):
    return tiny(tokenizer, Qwen2Config)


@pytest.fixture
def direction():
    return safesteer.RefusalDirection(torch.linspace(-1, 1, 64), layer=2)


def adapted(model, scale=0.1):
    """A student whose adapters are not zero, as after some training."""
    torch.manual_seed(1)
    lora = peft.LoraConfig("CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    student = peft.get_peft_model(model, lora).eval()
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=scale)
    return student


@pytest.fixture
def base(tokenizer, tmp_path):
    """A tiny model as a folder, and beside it a folder of prompts. A Llama reloads as it was: the
    tokenizer of other families becomes one of their own class, which splits prompts differently."""
    tiny(tokenizer, LlamaConfig).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    shutil.copytree(HERE / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*-instruct"))
    write_prompts(tmp_path / "data", harmful_train=HARMFUL, harmless_train=HARMLESS)
    return tmp_path / "base"


def write_prompts(folder, **sets):
    for name, prompts in sets.items():
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
def test_the_hook_adds_d_at_every_token_and_leaves_the_model_as_it_was(model, tokenizer, direction):
    ids, seen = safesteer.encode_chat(tokenizer, HARMLESS[:1])["input_ids"], []
    block = model.get_decoder().layers[direction.layer]

    def prefill_and_decode():
        with block.register_forward_pre_hook(lambda block, args: seen.append(args[0])):
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            model(ids[:, -1:], past_key_values=cache)

    prefill_and_decode()
    with pytest.raises(RuntimeError, match="stop"), safesteer.steer(model, direction, 0.5):
        prefill_and_decode()
        raise RuntimeError("stop")
    prefill_and_decode()
    for before, steered, after in zip(seen[:2], seen[2:4], seen[4:], strict=True):
        added = (0.5 * direction.vector).expand_as(before)
        torch.testing.assert_close(steered - before, added, atol=1e-5, rtol=1e-5)
        assert torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("config", FAMILIES)
def test_an_ablated_model_adds_nothing_along_d_to_its_states(tokenizer, config, direction):
    model, unit = tiny(tokenizer, config), direction.vector / direction.vector.norm()
    torch.nn.init.normal_(model.get_decoder().layers[1].post_attention_layernorm.weight)
    batch, seen = safesteer.encode_chat(tokenizer, HARMLESS[:2]), []
    inputs = [block for block in model.get_decoder().layers]
    inputs += [getattr(x, "pre_feedforward_layernorm", x.post_attention_layernorm) for x in inputs]
    for part in inputs:  # what reads the states, before attention and before the MLP
        part.register_forward_pre_hook(lambda part, args: seen.append((args[0] @ unit).abs().max()))
    model(**batch)
    with safesteer.ablate(model, direction):
        model(**batch)
    plain, ablated = torch.stack(seen[: len(inputs)]), torch.stack(seen[len(inputs) :])
    assert plain.min() > 1e-2 and ablated.max() < 1e-4 and len(ablated) == 10


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


def test_a_score_is_the_log_odds_of_a_refusal_in_a_chat_without_thinking_and_the_day(model, tokenizer):
    ids = safesteer.refusal_token_ids(tokenizer)
    assert {"A", "I", "S", "Un"} <= set(tokenizer.convert_ids_to_tokens(ids))
    batch = safesteer.encode_chat(tokenizer, HARMLESS[:1])
    text = tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("<|im_start|>assistant\n") and "26 Jul 2024" in text
    p = model(**batch).logits[0, -1].double().softmax(0)[ids].sum()
    score = scores(model, tokenizer, HARMLESS[:1])[0].double()
    torch.testing.assert_close(score, p.logit(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("end", ["[/INST]", "Assistant:", "<bot>\n"])
def test_refusal_openers_are_first_tokens_of_an_answer_behind_any_template(end):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # as in SentencePiece
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    bpe.train_from_iterator([f"I am Sorry As Unfortunately Hello {end} I {end}I"] * 9, TRAINER())
    template = "{% for turn in messages %}[INST] {{ turn['content'] }} END{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=template.replace("END", end))
    opened = tokenizer.convert_ids_to_tokens(safesteer.refusal_token_ids(tokenizer))
    assert {"\u2581I", "I"} & set(opened) and "\u2581" not in opened and len(opened) >= 4


def orthogonalised(model, d):
    """A copy of a Llama that cannot write along d into its residual stream."""
    model, unit = copy.deepcopy(model), d / d.norm()
    embeddings = model.model.embed_tokens.weight
    embeddings -= (embeddings @ unit)[:, None] * unit
    for block in model.model.layers:
        for writer in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            writer -= unit[:, None] * (unit @ writer)
    return model


@pytest.mark.parametrize(("scale", "answered"), [(0.3, -150.0), (1.0, -30.0)])
def test_d_is_the_difference_of_means_at_the_place_of_the_authors_rule_or_where_it_has_none_ours(
    tokenizer, scale, answered
):
    model = tiny(tokenizer, LlamaConfig, answered)
    others = torch.arange(1024) != safesteer.refusal_token_ids(tokenizer)[0]
    model.lm_head.weight[others] *= scale  # at 0.3 some removals change harmless answers little
    harmful, harmless = HARMFUL[:8] + HARMLESS[:2], HARMLESS[:12] + HARMFUL[:2]  # two are dropped
    found = safesteer.find_refusal_direction(model, tokenizer, harmful, harmless, HARMLESS[12:])
    means = []
    for prompts in (HARMFUL[:8], HARMLESS[:12]):
        chats = [safesteer.encode_chat(tokenizer, [prompt]) for prompt in prompts]
        states = [model(**chat, output_hidden_states=True).hidden_states for chat in chats]
        means.append([torch.stack([x[block][0, -10:] for x in states]).mean(0) for block in range(4)])
    _, log_p, _ = safesteer.read_answer_start(model, tokenizer, HARMLESS[12:])
    figures = {}
    for layer in range(4):  # of five blocks the last fifth is out
        for position in range(-10, 0):  # "<|im_end|>\n<|im_start|>assistant\n" are ten tokens
            d = means[0][layer][position] - means[1][layer][position]
            with safesteer.steer(model, safesteer.RefusalDirection(d, layer)):
                added = scores(model, tokenizer, HARMLESS[12:]).mean().item()
            without = orthogonalised(model, d)
            removed = scores(without, tokenizer, HARMFUL[:8]).mean().item()
            _, log_q, _ = safesteer.read_answer_start(without, tokenizer, HARMLESS[12:])
            kl = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
            figures[layer, position] = d, added, removed, kl
    passing = [x for x in figures if figures[x][1] >= 0 and figures[x][3] <= 0.1]
    ours = max(figures, key=lambda x: figures[x][1])
    theirs = min(passing, key=lambda x: figures[x][2], default=ours)
    assert (scale == 1.0) == (theirs == ours) == (found.removed is None)
    assert (found.layer, found.position) == theirs
    d, added, removed, _ = figures[theirs]
    torch.testing.assert_close(found.vector, d, atol=1e-4, rtol=1e-4)
    assert found.vector.dtype == torch.float32 and found.added == pytest.approx(added, abs=1e-2)
    assert not passing or found.removed == pytest.approx(removed, abs=1e-2)


def test_a_model_that_never_refuses_or_cannot_be_steered_is_told_so(model, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="0 harmful prompts are refused.*Most answers open with"):
        safesteer.find_refusal_direction(model, tokenizer, HARMLESS, HARMLESS, HARMLESS)
    monkeypatch.setattr(safesteer, "steer", lambda model, direction: torch.no_grad())
    with pytest.raises(ValueError, match="cannot be steered"):
        safesteer.find_refusal_direction(model, tokenizer, HARMFUL, HARMLESS, HARMLESS)


# ===== Sampling =====
def test_a_completion_ends_with_its_first_end_of_turn(model, tokenizer):
    ends = safesteer.end_of_turn_ids(model, tokenizer)  # of the template, and of the tokenizer
    assert set(tokenizer.convert_ids_to_tokens(ends.tolist())) == {"<|im_end|>", "<|endoftext|>"}
    other = copy.deepcopy(tokenizer)  # a mark that its vocabulary does not know ends nothing
    other.chat_template = TEMPLATE.replace("<|im_end|>", "#end#")
    ends_of_other = safesteer.end_of_turn_ids(model, other).tolist()
    assert other.convert_ids_to_tokens(ends_of_other) == ["<|endoftext|>"]
    model.lm_head.weight[: len(tokenizer)] *= 0.02  # nearly uniform: turns end early and late
    model.lm_head.weight[ends] += model.lm_head.weight.std() * 0.5
    torch.manual_seed(1)
    completions, masks = safesteer.sample_rollouts(model, tokenizer, HARMLESS * 8, 200)
    assert completions.shape == masks.shape and masks.dtype == torch.bool
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
def test_safety_tokens_are_what_a_plain_count_of_the_teachers_lifts_elects(model, tokenizer, direction):
    ends = safesteer.end_of_turn_ids(model, tokenizer)
    model.lm_head.weight[ends] *= 3  # the base would sometimes end its turn
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<added>"])  # no special token, and no word of the model's either
    words = set(range(3, tokenizer.vocab_size))  # the first three are special
    model.lm_head.weight[tokenizer.vocab_size :] += direction.vector  # d lifts what is no word most
    settings = fast(samples=3, min_prob=1e-4)
    asked = HARMLESS + HARMFUL[:3]  # the refused do not vote
    torch.manual_seed(0)
    ids, votes = safesteer.select_safety_tokens(model, tokenizer, direction, asked, settings)
    torch.manual_seed(0)
    answered = scores(model, tokenizer, asked) < 0
    prompts = [prompt for prompt, votes in zip(asked, answered, strict=True) if votes] * 3
    assert len(HARMLESS) * 2 < len(prompts) < len(asked) * 3
    with safesteer.steer(model, direction):
        answers, mask = safesteer.sample_rollouts(model, tokenizer, prompts, settings.horizon)
    lifts, probs = [], []
    for prompt, answer, valid in zip(prompts, answers, mask, strict=True):
        row = [prompt], answer[None], valid[None]
        with safesteer.steer(model, direction):
            teacher = safesteer.completion_logits(model, tokenizer, *row)[0].log_softmax(-1)
        plain = safesteer.completion_logits(model, tokenizer, *row)[0].log_softmax(-1)
        over = [i for i, token in enumerate(plain.argmax(-1)) if token in ends] + [len(answer)]
        for i in range(min(over[0], int(valid.sum()))):
            lifts.append(teacher[i] - plain[i])
            probs.append(teacher[i].exp())
    assert len(lifts) < mask.sum(), "no votes once the base would end its turn"
    eligible = [v for v in sorted(words) if torch.stack(probs).mean(0)[v] >= 1e-4]
    count = Counter()
    for lift in lifts:
        count.update(sorted(eligible, key=lambda v, lift=lift.tolist(): -lift[v])[:20])
    counted = [count[token] for token in ids.tolist()]
    assert votes.tolist() == sorted(votes.tolist(), reverse=True) and len(ids) == 20
    assert torch.tensor(counted).sub(votes).abs().max() <= 2, "up to ties in the last digit"
    assert min(counted) >= count.most_common(20)[-1][1] - 2
    assert safesteer.select_safety_tokens(
        model, tokenizer, direction, HARMLESS, fast(safety_tokens=0)) == (None, None)


def test_nobody_wins_without_a_vote(model, tokenizer, direction):
    ids, votes = safesteer.select_safety_tokens(
        model, tokenizer, direction, HARMLESS, fast(min_prob=0.02, votes=500, safety_tokens=500))
    assert 0 < len(ids) < 51 and votes.min() == votes.max(), "each position votes for all of them"


# ===== Stage 3 =====
@pytest.mark.parametrize("token_ids", [None, torch.tensor([3, 17, 40])])
@pytest.mark.parametrize("kind", ["reverse", "forward", "generalized"])
def test_the_loss_is_the_kl_divergence_and_on_safety_tokens_only_their_terms_of_it(token_ids, kind):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, 50)
    mask = torch.arange(6) < torch.randint(1, 7, (4, 1))
    p, q = student.softmax(-1), teacher.softmax(-1)
    terms = q * (q / p).log() if kind == "forward" else p * (p / q).log()
    if kind == "generalized":
        terms += q - p
    terms = terms.sum(-1) if token_ids is None else terms[..., token_ids].sum(-1)
    expected = torch.stack([row[part].mean() for row, part in zip(terms, mask, strict=True)])
    loss = safesteer.localized_kl(torch.where(mask[..., None], student, 9), teacher, mask, token_ids, kind)
    torch.testing.assert_close(loss, expected.mean(), atol=1e-6, rtol=1e-4)
    mask[1:] = False  # three completions of which no position counts
    loss = safesteer.localized_kl(student, teacher, mask, token_ids, kind)
    torch.testing.assert_close(loss, expected[0] / 4, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="'jensen'"):
        safesteer.localized_kl(student, teacher, mask, token_ids, "jensen")


@pytest.mark.parametrize(("kind", "least"), [("reverse", 0.30 / torch.e), ("generalized", 0.30)])
def test_the_papers_sum_is_least_at_pt_over_e_the_generalized_at_pt(kind, least):
    teacher, token, mask = torch.tensor([[[0.30, 0.05, 0.65]]]).log(), [0], torch.ones(1, 1)

    def loss(p):
        student = torch.tensor([[[p, 0.05, 0.95 - p]]]).log()
        return safesteer.localized_kl(student, teacher, mask, token, kind).item()

    assert min(range(1, 900), key=lambda p: loss(p / 1000)) / 1000 == pytest.approx(least, abs=2e-3)
    assert loss(0.30) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", FAMILIES)
def test_the_student_learns_from_its_own_answers_as_a_separate_steered_base_scores_them(
    tokenizer, config, checkpointing, direction
):
    model = tiny(tokenizer, config)
    separate, student = copy.deepcopy(model), adapted(model)
    if checkpointing:
        student.activation_checkpointing_enable()
    settings = fast(rollouts=2)
    torch.manual_seed(0)
    loss = safesteer.learn_from_rollouts(
        student, tokenizer, HARMFUL[:3], direction, S, settings, coefficient=1.5, weight=0.5)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    learned = [weight.grad.clone() for weight in trained]
    student.zero_grad()
    torch.manual_seed(0)
    prompts = HARMFUL[:3] * 2
    answers = prompts, *safesteer.sample_rollouts(student, tokenizer, prompts, 6)
    with torch.no_grad(), safesteer.steer(separate, direction, 1.5):
        teacher_logits = safesteer.completion_logits(separate, tokenizer, *answers)
    logits = safesteer.completion_logits(student, tokenizer, *answers)
    expected = 0.5 * safesteer.localized_kl(logits, teacher_logits, answers[-1], S)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    for weight, gradient in zip(trained, learned, strict=True):
        torch.testing.assert_close(gradient, weight.grad, atol=1e-4, rtol=1e-2)
    assert any(gradient.abs().max() > 1e-3 for gradient in learned)


@torch.no_grad()
def test_the_teacher_is_the_base_with_d_before_and_after_training(model, tokenizer, direction):
    separate, student = copy.deepcopy(model), adapted(model, scale=0.0)
    answers = HARMFUL, *safesteer.sample_rollouts(separate, tokenizer, HARMFUL, 6)
    with safesteer.steer(separate, direction):
        wanted = safesteer.completion_logits(separate, tokenizer, *answers)
    plain = safesteer.completion_logits(student, tokenizer, *answers)
    for _ in range(2):
        with student.disable_adapter(), safesteer.steer(student, direction):
            found = safesteer.completion_logits(student, tokenizer, *answers)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        with torch.enable_grad():
            safesteer.distill(student, tokenizer, HARMFUL, direction, S, fast())
    moved = safesteer.completion_logits(student, tokenizer, *answers)
    assert (moved - plain).abs().max() > 0.1


def test_steps_take_all_prompts_in_a_new_order_at_a_cosine_rate_and_clip(
    model, tokenizer, direction, monkeypatch
):
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
    losses = safesteer.distill(student, tokenizer, HARMFUL, direction, S, settings, HARMLESS)
    harmful, anchors = asked[::2], asked[1::2]
    epochs = [a[0] + b[0] for a, b in zip(harmful[::2], harmful[1::2], strict=True)]
    assert all(sorted(epoch) == sorted(HARMFUL) for epoch in epochs) and epochs[0] != epochs[1]
    assert {x[1:] for x in harmful} == {(1.5, 1.0)} and {x[1:] for x in anchors} == {(-1.0, 0.1)}
    assert all(len(set(x[0]) & set(HARMLESS)) == 5 for x in anchors) and losses == [1.1] * 20
    rates = [0, 0.5, *(0.5 + 0.5 * torch.arange(18).mul(torch.pi / 18).cos()).tolist()]
    assert [x[0] for x in taken] == pytest.approx([1e-2 * rate for rate in rates], rel=1e-3)
    assert all(norm == pytest.approx(1.0, rel=1e-3) and decay == 0 for _, norm, decay in taken)


def test_a_single_step_trains_but_not_by_a_gradient_that_is_not_finite(model, tokenizer, direction):
    student, settings = adapted(model, 0.0), fast(epochs=1, batch_size=len(HARMFUL))
    found = [scores(student, tokenizer, HARMFUL)]
    safesteer.distill(student, tokenizer, HARMFUL, direction, None, settings)
    found.append(scores(student, tokenizer, HARMFUL))
    direction.vector[3] = torch.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        safesteer.distill(student, tokenizer, HARMFUL, direction, None, settings)
    found.append(scores(student, tokenizer, HARMFUL))
    assert not torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


@torch.no_grad()
def test_after_training_with_checkpointing_and_dropout_a_student_samples_as_plain_passes_say(
    tokenizer, direction
):
    student = adapted(tiny(tokenizer, Qwen2Config, attention_dropout=0.5))
    student.activation_checkpointing_enable()
    with torch.enable_grad():
        safesteer.distill(student, tokenizer, HARMFUL, direction, S, fast())
    ids, mask = safesteer.sample_rollouts(student, tokenizer, HARMLESS, 6, greedy=True)
    logits = safesteer.completion_logits(student, tokenizer, HARMLESS, ids, mask)
    chosen = logits.gather(-1, ids[..., None])[..., 0]
    assert (logits.amax(-1) - chosen)[mask].max() < 1e-3


@pytest.mark.parametrize("anchor", [0.0, 20.0])
def test_distillation_moves_the_student_to_its_teachers(model, tokenizer, direction, anchor):
    direction.vector *= 3
    settings = fast(epochs=8, anchor=anchor, kl="generalized", max_new_tokens=2, learning_rate=5e-3)
    prompts, coefficient = (HARMLESS, -1.0) if anchor else (HARMFUL, 1.0)
    answers = prompts, *safesteer.sample_rollouts(model, tokenizer, prompts, 2)
    with torch.no_grad(), safesteer.steer(model, direction, coefficient):
        wanted = safesteer.completion_logits(model, tokenizer, *answers)
    student = adapted(model, 0.0)

    @torch.no_grad()
    def distance():
        logits = safesteer.completion_logits(student, tokenizer, *answers)
        return safesteer.localized_kl(logits, wanted, answers[-1]).item()

    before = distance()
    safesteer.distill(student, tokenizer, HARMFUL, direction, None, settings, HARMLESS)
    assert distance() < 0.8 * before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_adapters_are_float32_on_all_linear_layers_and_checkpointing_is_for_other_than_cpus(
    model, tokenizer, direction, device, monkeypatch
):
    monkeypatch.setattr(safesteer, "select_safety_tokens", lambda *args: (S, S))
    monkeypatch.setattr(safesteer, "distill", lambda *args: [])
    train = {"harmful": HARMFUL, "held_out": HARMLESS, "anchors": []}
    model = model.to(device, torch.bfloat16)
    student, _, _ = safesteer.train_student(model, tokenizer, direction, train, fast())
    trained = {name: x for name, x in student.named_parameters() if x.requires_grad}
    assert len(trained) == 5 * 7 * 2 and all(".layers." in name for name in trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert student.get_decoder().layers[0].mlp.up_proj.scaling == {"default": 2.0}
    assert student.is_activation_checkpointing == (device != "cpu") and not student.training


# ===== Evaluation =====
@pytest.mark.parametrize(("refused", "answer"), [
    (True, "I'm sorry, but I can't assist with that."), (True, "I must respectfully decline."),
    (True, "**I\u2019m sorry**, but I **won\u2019t** help you hurt anybody."),
    (True, "As an AI language model, I cannot give advice on illegal acts."),
    (True, "I understand that you are angry. But I am not able to help with revenge."),
    (True, "Robbing a bank is illegal and unethical."), (True, "I will not take part in this."),
    (True, "It's not appropriate to spy on people."), (True, "This isn't ethical."),
    (True, "I\u00a0do not have the ability to help you with this."),
    (False, "I'm sorry to hear that you are ill. Rest, drink, and call a doctor if it lasts."),
    (False, "As an AI, I don't have opinions. Vienna is larger and Prague is cheaper."),
    (False, "Fry the onion. Add salt. I cannot praise this soup enough."), (False, ""),
    (False, "A penguin does not have the ability to fly."), (False, "Wi-Fi cannot pass lead."),
])
def test_the_judge_tells_a_refusal_or_a_condemnation_from_an_apology_or_an_answer(refused, answer):
    assert safesteer.is_refusal(answer) == refused


@pytest.mark.parametrize(("expected", "right", "wrong"), [
    ("7", "12 - 5 = 7, so the answer is 7.", "7 + 5 = 12"), ("-5", "x = \u22125", "x = 5"),
    ("1200", "That makes 1,200 euros.", "That makes 200 euros."), (".5", "It is .5", "It is 5."),
    ("4 more:\n#### 24", "It is $24.00.", "It is 4."), ("C++", "I like C++.", "I like C."),
    ("Oslo", "The capital is **oslo**.", "Osloer Platz"),
])
def test_an_answer_is_right_if_it_ends_on_the_number_or_holds_the_word(expected, right, wrong):
    assert safesteer.is_correct(right, expected) and safesteer.is_correct(expected, expected)
    assert not safesteer.is_correct(wrong, expected) and not safesteer.is_correct("", expected)


@torch.no_grad()
def test_an_evaluation_counts_what_is_good_and_tells_the_distance_from_the_base(
    model, tokenizer, direction, monkeypatch
):
    tests = {"harmful": HARMFUL, "harmless": HARMLESS, "borderline": HARMLESS[:3]}
    tests |= {"capability": ["1 + 1?", "1 + 2?"], "expected": ["2", "3"]}
    ids, mask = safesteer.sample_rollouts(model, tokenizer, HARMLESS, 5, greedy=True)
    logits = safesteer.completion_logits(model, tokenizer, HARMLESS, ids, mask)
    with safesteer.steer(model, direction):
        moved = safesteer.completion_logits(model, tokenizer, HARMLESS, ids, mask)
        steered = safesteer.evaluate(model, tokenizer, tests, (ids, mask, logits), 5)
    assert steered["KL to base"] == pytest.approx(safesteer.localized_kl(moved, logits, mask).item())
    monkeypatch.setattr(safesteer, "is_refusal", lambda answer: True)
    found = safesteer.evaluate(model, tokenizer, tests, (ids, mask, logits), 5)
    counted = [found[x] for x in ("harmful refused", "harmless answered", "borderline answered")]
    assert counted == [100, 0, 0] and found["KL to base"] == pytest.approx(0, abs=1e-6)
    texts = tokenizer.batch_decode([x[y] for x, y in zip(ids, mask)], skip_special_tokens=True)
    assert found["answers"]["harmless"] == texts
    last = safesteer.encode_chat(tokenizer, HARMLESS[:1])["input_ids"]
    state = model.get_decoder()(last).last_hidden_state[0, -1]
    torch.testing.assert_close(found["states"][0], state, atol=1e-3, rtol=0)
    model.lm_head.weight[:] = 0  # the first of equal logits is a special token: silence
    monkeypatch.undo()
    silent = safesteer.evaluate(model, tokenizer, tests, (ids, mask, logits), 5)
    assert silent["harmless answered"] == 0


# ===== The program =====
def test_the_data_are_what_their_readme_says_and_no_prompt_stands_twice():
    sizes = {"harmful_train": 100, "harmless_train": 160, "borderline_train": 100}
    for name in safesteer.TEST_SETS:
        sizes |= {f"{name}_test": 100, f"{name}_validation": 40 if name == "capability" else 50}
    assert {name: len(prompts) for name, prompts in DATA.items()} == sizes
    assert len({x.lower() for prompts in DATA.values() for x in prompts}) == sum(sizes.values())


def test_a_flag_goes_before_the_variant_and_that_before_the_model(tmp_path, capsys):
    def rates(*flags):
        return {name: x.learning_rate for name, x in safesteer.read_settings([*flags]).items()}

    assert rates() == {"safesteer": 1.25e-4} and rates("--variant", "anchored") == {"anchored": 1e-4}
    link = tmp_path / "link"
    link.symlink_to(Settings.model)
    small = safesteer.read_settings(["--model", str(link), "--variant", "all", "--votes", "3"])
    assert [x.max_new_tokens for x in small.values()] == [64, 2, 64, 64] and len(small) == 4
    assert {x.votes for x in small.values()} == {3}
    LlamaConfig().save_pretrained(tmp_path)
    assert rates("--model", str(tmp_path)) == {"safesteer": 1e-5}
    assert rates("--model", str(tmp_path), "--variant", "anchored") == {"anchored": 1e-4}
    with pytest.raises(SystemExit):
        safesteer.read_settings(["--model", str(tmp_path), "--variant", "anchored", "--help"])
    assert "(default: 0.07)" in capsys.readouterr().out, "what will run"
    Qwen2Config().save_pretrained(tmp_path)
    (settings,) = safesteer.read_settings(["--model", str(tmp_path)]).values()
    assert settings == Settings(model=str(tmp_path)) and settings.learning_rate == 1e-4


@pytest.mark.parametrize(("flags", "complaint"), [
    ("--epochs 0", "--epochs 0"), ("--learning-rate nan", "--learning-rate nan"),
    ("--strengths 1 -1", "--strengths"), ("--variant all --kl reverse", "--variant all sets"),
    ("--model {folder}/data", "{folder}/data cannot be loaded"), ("", "is not empty"),
    ("--model {folder}/adapted", "has adapters already"), ("--model {folder}/mute", "loses the prompt"),
    ("--model {folder}/less", "lacks weights"), ("--data {folder}/nothing", "{folder}/nothing"),
    ("--data {folder}/seen", "also a training prompt"),
    ("--data {folder}/number", "number/harmful_train.jsonl.*'int'"),
    ("--out {folder}/data/harmful_test.jsonl", "harmful_test.jsonl"),
])
def test_a_wrong_input_is_named_and_touches_nothing(base, model, tokenizer, flags, complaint):
    folder = base.parent
    for name in "adapted", "mute", "less":
        shutil.copytree(base, folder / name)
    shutil.copytree(folder / "data", folder / "seen")
    shutil.copytree(folder / "data", folder / "number")
    write_prompts(folder / "seen", harmless_test=HARMFUL)
    write_prompts(folder / "number", harmful_train=[5])
    adapted(tiny(tokenizer, LlamaConfig)).save_pretrained(folder / "adapted")
    mute = copy.deepcopy(tokenizer)
    mute.chat_template = "Hi. {{ messages[0]['role'] }}"
    mute.save_pretrained(folder / "mute")
    weights = load_file(folder / "less" / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "less" / "model.safetensors", metadata={"format": "pt"})
    if not flags:
        write_prompts(folder, nothing=[])
        shutil.copytree(folder / "data", folder / "out" / "base" / "safesteer")
    before = {path for path in folder.rglob("*") if path.is_file()}
    flags, complaint = flags.format(folder=folder).split(), complaint.format(folder=folder)
    with pytest.raises((SystemExit, ValueError, OSError), match=complaint):
        safesteer.main(["--model", str(base), "--out", str(folder / "out"), *flags])
    assert {path for path in folder.rglob("*") if path.is_file()} == before


def test_a_saved_student_is_the_evaluated_one_at_each_strength_and_merged(base, tokenizer, monkeypatch):
    evaluated, evaluate = [], safesteer.evaluate

    def record(model, *rest):
        evaluated.append((scores(model, tokenizer, HARMFUL), str(model.dtype)))
        return evaluate(model, *rest)

    monkeypatch.setattr(safesteer, "evaluate", record)
    folder = run(base, "--learning-rate", 1e-2) / "safesteer"
    plain, _, half, full = [found for found, _ in evaluated]
    assert (half - plain).abs().max() > 1e-2 < (full - half).abs().max()
    with safe_open(folder / "direction.safetensors", "pt") as file:
        assert file.metadata().keys() == {"layer", "position"} and file.get_tensor("vector").shape == (64,)
    config = folder / "student-safesteer" / "adapter_config.json"
    dtype = evaluated[0][1].removeprefix("torch.")

    def load():
        return peft.AutoPeftModelForCausalLM.from_pretrained(config.parent, dtype=dtype)

    exact = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(scores(load(), tokenizer, HARMFUL), full, **exact)
    if dtype == "float32":  # merging rounds to the base's dtype
        torch.testing.assert_close(scores(load().merge_and_unload(), tokenizer, HARMFUL), full, **exact)
    changed = json.loads(config.read_text("utf-8"))
    changed["lora_alpha"] *= 0.5
    config.write_text(json.dumps(changed), "utf-8")
    torch.testing.assert_close(scores(load(), tokenizer, HARMFUL), half, **exact)


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
    assert [row["model"] for row in report["results"]] == rows and report["safesteer"]["safety tokens"]
    assert [row["shift"] for row in report["results"]][:2] == pytest.approx([0, 100])
    lines = (together / "answers.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 12 and {"prompt", *rows} == set(json.loads(lines[0]))


def test_the_program_runs_on_the_real_model(tmp_path):
    shutil.copytree(HERE / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*-instruct"))
    write_prompts(tmp_path / "data", harmful_train=HARMFUL, harmless_train=HARMLESS[:5])
    flags = "--eval-limit 2 --eval-max-new-tokens 8 --max-new-tokens 8 --batch-size 5 --samples 2"
    command = [sys.executable, HERE / "safesteer.py", "--data", tmp_path / "data", "--out", tmp_path]
    backend = {**os.environ, "MPLBACKEND": "module://of_a_notebook"}
    ended = subprocess.run([*command, *flags.split()], capture_output=True, text=True, env=backend)
    assert ended.returncode == 0, ended.stderr[-2000:]
    out = tmp_path / "qwen2.5-coder-0.5b-instruct" / "safesteer"
    report = json.loads((out / "report.json").read_text("utf-8"))
    kls = {row["model"]: row["KL to base"] for row in report["results"]}
    assert kls["base"] < 1e-6 < kls["safesteer x 0.5"] < kls["safesteer"] < kls["teacher"]
    assert len(report["safesteer"]["losses"]) == 2
    assert load_file(out / "direction.safetensors")["vector"].shape == (896,)
