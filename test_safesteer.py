"""Claims about SafeSteer, on tiny random models, and one short run of the real program: pytest"""
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import safesteer
from safesteer import Settings, ablate, completion_logits, encode_chat, localized_kl, make_student
from safesteer import read_answer_start, sample_rollouts, steer

torch.set_num_threads(1)  # tiny models gain nothing from more
HERE = Path(__file__).resolve().parent
TRAIN, TESTS = safesteer.load_data(Settings())
HARMFUL, HARMLESS = TRAIN["harmful"][::10], TRAIN["held_out"][::2]
TEMPLATE = (  # with what is hard in real ones: a date, a system turn, thinking, an added newline
    "<|im_start|>system\nToday is {{ date_string }}.<|im_end|>\n"
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}\n<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}")
FAMILIES = Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig, Gemma2Config
D = safesteer.RefusalDirection(torch.linspace(-1, 1, 64), layer=2)  # some direction
S = torch.arange(100, 150)  # some safety tokens


def fast(**changes):
    tokens = dict(samples=2, votes=20, safety_tokens=20, max_new_tokens=6)
    steps = dict(epochs=2, batch_size=5, rollouts=1, learning_rate=1e-3, lora=4)
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
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, **ends)
    tokenizer.add_tokens(["\n"])  # no special token, and no word of the model's either
    return tokenizer


def tiny(tokenizer, config, answered=-30.0, **changes):
    """A random model of five blocks, its vocabulary larger than the tokenizer's, that refuses
    HARMFUL alone. `answered` is the logit by which it answers HARMLESS. Its window, where it has
    one, is shorter than the prompts."""
    torch.manual_seed(0)
    config = config(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.2,
        sliding_window=None if config is LlamaConfig else 8, **changes)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    _, _, states = read_answer_start(model, tokenizer, HARMFUL + HARMLESS)
    wanted = torch.tensor([30.0] * len(HARMFUL) + [answered] * len(HARMLESS))
    opener = safesteer.refusal_token_ids(tokenizer)[0]
    model.lm_head.weight[opener] = torch.linalg.pinv(states[:, 0, -1]) @ wanted
    return model


@pytest.fixture
def model(tokenizer):
    return tiny(tokenizer, Qwen2Config)


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
        lines = [json.dumps({"instruction": prompt, "answer": prompt}) for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")


def run(base, *flags):
    quick = "--epochs 1 --lora 2 --max-new-tokens 4 --eval-limit 3 --samples 2 --min-prob 0".split()
    places = "--model", base, "--data", base.parent / "data", "--out", base.parent / "out"
    safesteer.main([*quick, *map(str, (*places, *flags))])
    return base.parent / "out" / "base"


def scores(model, tokenizer, prompts):
    return read_answer_start(model, tokenizer, prompts)[0]


# ===== Stage 1 =====
@torch.no_grad()
def test_the_hook_adds_d_at_every_token_and_leaves_the_model_as_it_was(model, tokenizer):
    ids, seen = encode_chat(tokenizer, HARMLESS[:1]).input_ids, []
    inside = model.get_decoder().layers[D.layer].input_layernorm
    inside.register_forward_pre_hook(lambda part, args: seen.append(args[0]))

    def prefill_and_decode():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        model(ids[:, -1:], past_key_values=cache)

    prefill_and_decode()
    with pytest.raises(RuntimeError, match="stop"), steer(model, D, 0.5):
        prefill_and_decode()
        raise RuntimeError("stop")
    prefill_and_decode()
    for before, steered, after in zip(seen[:2], seen[2:4], seen[4:], strict=True):
        torch.testing.assert_close(steered, before + 0.5 * D.vector, atol=1e-5, rtol=1e-5)
        assert torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("config", FAMILIES)
def test_an_ablated_models_blocks_get_nothing_along_d_nor_add_it(tokenizer, config):
    model, unit = tiny(tokenizer, config), D.vector / D.vector.norm()
    batch, seen = encode_chat(tokenizer, HARMLESS[:2]), []
    plain = torch.stack(model(**batch, output_hidden_states=True).hidden_states[:-1])
    with ablate(model, D):
        for block in model.get_decoder().layers:
            block.self_attn.register_forward_hook(lambda part, args, out: seen.append(out[0]))
            block.mlp.register_forward_hook(lambda part, args, out: seen.append(out))
        ablated = model(**batch, output_hidden_states=True).hidden_states[:-1]
    ablated = torch.stack([*ablated, *seen])
    assert len(ablated) == 15 and (ablated @ unit).abs().max() < 1e-4
    assert (plain @ unit).abs().amax((1, 2)).min() > 1e-2
    along = (plain[0] @ unit)[..., None] * unit
    torch.testing.assert_close(ablated[0], plain[0] - along, msg="only d is lost")


@pytest.mark.parametrize("config", FAMILIES)
def test_a_prompts_numbers_do_not_depend_on_its_batch(tokenizer, config):
    model, prompts = tiny(tokenizer, config), HARMFUL[:3] + HARMLESS[:5]
    together, _, states = read_answer_start(model, tokenizer, prompts, positions=2)
    answers, mask = sample_rollouts(model, tokenizer, prompts, 6, greedy=True)
    logits = completion_logits(model, tokenizer, prompts, answers, mask)
    chosen = logits.gather(-1, answers[..., None])[..., 0]
    assert (logits.amax(-1) - chosen)[mask].max() < 1e-3, "they predict the completion"
    for i, prompt in enumerate(prompts):
        alone, _, state = read_answer_start(model, tokenizer, [prompt], positions=2)
        pairs = (alone[0], state[0]), (together[i], states[i])
        torch.testing.assert_close(*pairs, atol=1e-3, rtol=0)
        answer, mask = sample_rollouts(model, tokenizer, [prompt], 6, greedy=True)
        assert torch.equal(answer[mask], answers[i, : answer.shape[1]][mask[0]])


def test_a_score_is_the_log_odds_of_a_refusal_without_thinking_and_the_day(model, tokenizer):
    ids = safesteer.refusal_token_ids(tokenizer)
    assert {"A", "I", "S", "Un"} <= set(tokenizer.convert_ids_to_tokens(ids))
    batch = encode_chat(tokenizer, HARMLESS[:1])
    text = tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("<|im_start|>assistant\n") and "26 Jul 2024" in text
    output = model(**batch, output_hidden_states=True)
    p = output.logits[0, -1].double().softmax(0)[ids].sum()
    score, _, states = read_answer_start(model, tokenizer, HARMLESS[:1], positions=9)
    torch.testing.assert_close(score[0].double(), p.logit(), atol=1e-3, rtol=1e-3)
    hidden = torch.stack(output.hidden_states, 2)[0, -9:]
    torch.testing.assert_close(states[0], hidden, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("rule", "scale", "factor"), [
    ("theirs", 0.3, 1.0), ("ours", 0.3, torch.nan), ("ours", 0.5, 1.0)])
def test_d_is_the_authors_choice_or_ours(tokenizer, monkeypatch, rule, scale, factor):
    def read(model, tokenizer, prompts, *positions):
        assert not model.get_decoder().layers[4]._forward_pre_hooks, "the last fifth is out"
        found, *others = read_answer_start(model, tokenizer, prompts, *positions)
        removing = model.get_input_embeddings()._forward_hooks and prompts[0] in HARMFUL
        return found * (factor if removing else 1.0), *others

    monkeypatch.setattr(safesteer, "read_answer_start", read)
    model, held_out, figures = tiny(tokenizer, LlamaConfig, -150.0), HARMLESS[12:], []
    others = torch.arange(1024) != safesteer.refusal_token_ids(tokenizer)[0]
    model.lm_head.weight[others] *= scale  # at 0.3 some KLs are below 0.1, at 0.5 none is
    found = safesteer.find_refusal_direction(
        model, tokenizer, HARMFUL[:8] + HARMLESS[:2],  # of each kind, the last two are dropped
        HARMLESS[:12] + HARMFUL[:2], held_out + HARMFUL[:2])
    _, _, refused = read_answer_start(model, tokenizer, HARMFUL[:8], positions=11)
    _, _, obeyed = read_answer_start(model, tokenizer, HARMLESS[:12], positions=11)
    _, log_p, _ = read_answer_start(model, tokenizer, held_out)
    differences = refused.mean(0) - obeyed.mean(0)
    for layer in range(4):
        for position in range(-11, 0):  # "\n<|im_end|>\n<|im_start|>assistant\n" has 11 tokens
            candidate = safesteer.RefusalDirection(differences[position, layer], layer)
            with steer(model, candidate):
                added = scores(model, tokenizer, held_out).mean().item()
            with ablate(model, candidate):
                removed = scores(model, tokenizer, HARMFUL[:8]).mean().item()
                _, log_q, _ = read_answer_start(model, tokenizer, held_out)
            kl = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
            figures.append((added, removed, kl, layer, position))
    passing = [x for x in figures if x[0] >= 0 and x[2] <= 0.1]
    choices = {"theirs": min(passing, key=lambda x: x[1], default=None), "ours": max(figures)}
    assert bool(passing) == (scale == 0.3) and choices["theirs"] != choices["ours"]
    added, removed, _, layer, position = choices[rule]
    assert (found.layer, found.position) == (layer, position)
    torch.testing.assert_close(found.vector, differences[position, layer], atol=1e-4, rtol=1e-4)
    expected = added, removed if rule == "theirs" else None
    assert (found.added, found.removed) == pytest.approx(expected, abs=1e-2)


# ===== Sampling =====
def test_a_completion_ends_with_its_first_end_of_turn(model, tokenizer):
    model.generation_config.eos_token_id = [77]
    ends = safesteer.end_of_turn_ids(model, tokenizer)
    assert ends.tolist() == [0, 2, 77], "<|endoftext|>, <|im_end|> and the model's own"
    model.lm_head.weight[: len(tokenizer)] *= 0.02  # nearly uniform: turns end early and late
    model.lm_head.weight[ends] += model.lm_head.weight.std() * 0.5
    torch.manual_seed(1)
    completions, masks = sample_rollouts(model, tokenizer, HARMLESS * 8, 200)
    for ids, mask in zip(completions, masks, strict=True):
        ids, length = ids[mask].tolist(), int(mask.sum())
        assert mask[:length].all() and not set(ids[:-1]) & set(ends.tolist())
        assert ids[-1] in ends or length == 200
    assert len(set(masks.sum(1).tolist())) > 5


@torch.no_grad()
def test_answers_follow_the_softmax_whatever_the_models_own_settings(model, tokenizer):
    greedy, _ = sample_rollouts(model, tokenizer, HARMLESS, 8, greedy=True)
    own = dict(temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=3.0, num_beams=2)
    model.generation_config = GenerationConfig(do_sample=True, max_length=9, **own)
    assert torch.equal(greedy, sample_rollouts(model, tokenizer, HARMLESS, 8, greedy=True)[0])
    log_p = model(**encode_chat(tokenizer, HARMLESS[:1])).logits[0, -1].log_softmax(0)
    torch.manual_seed(0)
    ids, _ = sample_rollouts(model, tokenizer, HARMLESS[:1] * 2000, 1)
    entropy = -(log_p.exp() * log_p).sum().item()
    assert -log_p[ids].mean().item() == pytest.approx(entropy, abs=0.2) and entropy > 5


# ===== Stage 2 =====
@torch.no_grad()
def test_safety_tokens_win_a_plain_count_of_what_d_lifts_most(model, tokenizer):
    ends = safesteer.end_of_turn_ids(model, tokenizer)
    model.lm_head.weight[ends] *= 3  # the base would sometimes end its turn
    words = range(3, tokenizer.vocab_size)  # the first three are special
    model.lm_head.weight[tokenizer.vocab_size :] += D.vector  # d lifts what is no word most
    asked, settings = HARMLESS + HARMFUL[:3], fast(samples=3, min_prob=1e-4)
    torch.manual_seed(0)
    ids, votes = safesteer.select_safety_tokens(model, tokenizer, D, asked, HARMFUL, settings)
    torch.manual_seed(0)
    answered = scores(model, tokenizer, asked) < 0  # the refused do not vote
    prompts = [asked[i] for i in answered.nonzero()] * 3
    assert len(HARMLESS) * 2 < len(prompts) < len(asked) * 3
    with steer(model, D):
        answers, mask = sample_rollouts(model, tokenizer, prompts, settings.horizon)
        log_t = completion_logits(model, tokenizer, prompts, answers, mask).log_softmax(-1)
    log_p = completion_logits(model, tokenizer, prompts, answers, mask).log_softmax(-1)
    over, _ = torch.isin(log_p.argmax(-1), ends).int().cummax(1)
    voting = mask & (over == 0)
    assert voting.sum() < mask.sum(), "no votes once the base would end its turn"
    lifts, probs = (log_t - log_p)[voting], log_t[voting].exp().mean(0)
    eligible = torch.tensor([token for token in words if probs[token] >= 1e-4])
    count = Counter(eligible[lifts[:, eligible].topk(20).indices].flatten().tolist())
    counted = [count[token] for token in ids.tolist()]
    assert votes.tolist() == sorted(votes.tolist(), reverse=True) and len(ids) == 20
    assert torch.tensor(counted).sub(votes).abs().max() <= 2, "up to ties in the last digit"
    assert min(counted) >= count.most_common(20)[-1][1] - 2


@torch.no_grad()
def test_nobody_wins_without_a_vote_nor_what_the_base_says_often(model, tokenizer, monkeypatch):
    def elect(**changes):
        settings = fast(votes=500, safety_tokens=500, **changes)
        torch.manual_seed(0)
        return safesteer.select_safety_tokens(model, tokenizer, D, HARMLESS, HARMFUL, settings)

    ids, votes = elect(min_prob=0.02)
    assert 0 < len(ids) < 51 and votes.min() == votes.max(), "each position votes for all of them"
    with pytest.raises(ValueError, match="S is empty"):  # else training would do nothing
        elect(min_prob=1.0)
    torch.manual_seed(1)
    answers, mask = sample_rollouts(model, tokenizer, HARMFUL, 6)
    logits = completion_logits(model, tokenizer, HARMFUL, answers, mask)
    torch.manual_seed(1)
    said = safesteer.mean_probability(model, tokenizer, HARMFUL, fast())
    torch.testing.assert_close(said, logits[mask].softmax(-1).mean(0), atol=1e-6, rtol=1e-3)
    monkeypatch.setattr(safesteer, "mean_probability", lambda *args: said)
    (free, _), (bound, _) = elect(), elect(max_prob=1e-4)
    assert (said[free] > 1e-4).sum() > 5 and len(bound) > 50 and said[bound].max() <= 1e-4


# ===== Stage 3 =====
@pytest.mark.parametrize("token_ids", [None, torch.tensor([3, 17, 40])])
@pytest.mark.parametrize("kind", ["reverse", "forward", "generalized"])
def test_the_loss_is_the_kl_or_on_safety_tokens_their_terms_of_it(token_ids, kind):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, 50).bfloat16()
    lengths = torch.tensor([6, 0, 1, 4])  # of the second completion no position counts
    p, q = student.float().softmax(-1), teacher.float().softmax(-1)  # as exact as can be
    terms = q * (q / p).log() if kind == "forward" else p * (p / q).log()
    terms += q - p if kind == "generalized" else 0
    terms = terms.sum(-1) if token_ids is None else terms[..., token_ids].sum(-1)
    expected = sum(terms[i, :length].mean() for i, length in enumerate(lengths) if length) / 4
    mask = torch.arange(6) < lengths[:, None]
    student[~mask] = 9
    loss = localized_kl(student, teacher, mask, token_ids, kind)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("config", "lora"), [*((x, 4) for x in FAMILIES), (Qwen2Config, 0)])
def test_a_student_learns_on_its_own_answers_from_the_steered_base(tokenizer, config, lora):
    base, settings = tiny(tokenizer, config, attention_dropout=0.5), fast(rollouts=2, lora=lora)
    student, passes = make_student(base, settings), []
    found, expected = scores(student, tokenizer, HARMFUL), scores(base, tokenizer, HARMFUL)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0, msg="it starts as the base")
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data += 0.2 * torch.randn_like(weight)  # as after some training
    torch.manual_seed(0)
    prompts = HARMFUL[:3] * 2
    answers = prompts, *sample_rollouts(student, tokenizer, prompts, 6)
    with torch.no_grad(), steer(base, D, 1.5):
        teacher_logits = completion_logits(base, tokenizer, *answers)
    logits = completion_logits(student, tokenizer, *answers)
    expected = 0.5 * localized_kl(logits, teacher_logits, answers[-1], S)
    gradients = torch.autograd.grad(expected, weights)
    student.get_decoder().layers[0].self_attn.register_forward_hook(
        lambda part, *_: passes.append((torch.is_grad_enabled(), part.training)))
    student.activation_checkpointing_enable()
    torch.manual_seed(0)
    with steer(base, D, 1.5) as teacher:
        loss = safesteer.learn_from_rollouts(
            student, teacher, tokenizer, HARMFUL[:3], S, settings, weight=0.5)
    assert loss == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    for weight, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-4, rtol=1e-2)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
    assert passes.count((True, False)) == 2 * 6, "checkpointing: a pass, and again for the gradient"
    assert not any(x for _, x in passes) and not any(part.training for part in student.modules())


@pytest.mark.parametrize(("lora", "rate"), [(0, 1e-3), (4, 1e-2)])
def test_steps_take_all_prompts_at_a_cosine_rate_clipped(model, tokenizer, monkeypatch, lora, rate):
    settings, asked, taken = fast(epochs=10, anchor=0.1, coefficient=1.5, lora=lora), [], []

    def learn(student, teacher, tokenizer, prompts, token_ids, settings, weight=1.0):
        (hook,) = model.get_decoder().layers[D.layer]._forward_pre_hooks.values()
        (steered,) = hook(None, (torch.zeros(64),))
        asked.append((prompts, round((steered / D.vector).mean().item(), 3), weight))
        assert teacher is model
        for weights in student.parameters():
            weights.grad = torch.full_like(weights, 9.0) if weights.requires_grad else None
        return weight

    def step(optimizer, *_):
        (group,) = optimizer.param_groups
        norms = [x.grad.norm() for x in group["params"] if x.grad is not None]
        taken.append((group["lr"], torch.stack(norms).norm().item()))
        assert (group["weight_decay"], group["eps"], group["betas"]) == (0, 1e-8, (0.9, 0.999))

    monkeypatch.setattr(safesteer, "learn_from_rollouts", learn)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    student = make_student(model, settings)
    losses = safesteer.distill(student, model, tokenizer, HARMFUL, D, S, settings, HARMLESS)
    harmful, anchors = asked[::2], asked[1::2]
    epochs = [a[0] + b[0] for a, b in zip(harmful[::2], harmful[1::2], strict=True)]
    assert all(sorted(epoch) == sorted(HARMFUL) for epoch in epochs) and epochs[0] != epochs[1]
    assert {x[1:] for x in harmful} == {(1.5, 1.0)} and {x[1:] for x in anchors} == {(-1.0, 0.1)}
    assert all(len(set(x[0]) & set(HARMLESS)) == 5 for x in anchors) and losses == [1.1] * 20
    rates = [0, 0.5, *(0.5 + 0.5 * torch.arange(18).mul(torch.pi / 18).cos()).tolist()]
    assert [x[0] for x in taken] == pytest.approx([rate * part for part in rates], rel=1e-3)
    assert [x[1] for x in taken] == pytest.approx([1.0] * 20, rel=1e-3)


def test_all_weights_train_in_bfloat16_numbers_until_a_gradient_is_none(model, tokenizer):
    settings, broken = fast(lora=0), safesteer.RefusalDirection(D.vector * torch.nan, layer=2)
    student = make_student(model, settings)
    safesteer.distill(student, model, tokenizer, HARMFUL, D, S, settings)
    pairs = list(zip(student.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(new, new.bfloat16().float()) for new, _ in pairs)
    assert any(not torch.equal(new, old.bfloat16().float()) for new, old in pairs)
    with pytest.raises(RuntimeError, match="non-finite"):
        safesteer.distill(student, model, tokenizer, HARMFUL, broken, S, settings)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_layers_adapt_in_float32_and_gpus_checkpoint(model, device):
    student = make_student(model.to(device, torch.bfloat16), fast())
    trained = {name: x for name, x in student.named_parameters() if x.requires_grad}
    assert len(trained) == 5 * 7 * 2 and all(".layers." in name for name in trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert student.get_decoder().layers[0].mlp.up_proj.scaling == {"default": 2.0}
    assert student.is_activation_checkpointing == (device != "cpu") and not student.training
    frozen = {id(x) for x in student.parameters() if not x.requires_grad}
    assert frozen == {id(x) for x in model.parameters()}, "no second copy of the weights"


def test_training_begins_alike_whatever_the_vote_draws(model, tokenizer, monkeypatch):
    drawn = []
    monkeypatch.setattr(safesteer, "distill", lambda *args: drawn.append(torch.rand(3)))
    for draws in 1, 2:
        monkeypatch.setattr(safesteer, "select_safety_tokens", lambda *x: (x[3], torch.rand(draws)))
        _, voters, _, _ = safesteer.train_student(model, tokenizer, D, TRAIN, fast())
        assert voters == TRAIN["held_out"]
    assert torch.equal(*drawn)


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
    ("7", "12 - 5 = 7, as B2 says.", "7 + 5 = 12"), ("-5", "x = \u22125", "x = 5"),
    ("1200", "That makes $1,200.00.", "That makes 200 dollars."),
    ("Oslo", "The capital is **oslo**.", "Osloer Platz"), ("5 km", "It is 5 km.", "It is 12.5 km."),
    ("10 m", "Only 10 m!", "It is -10 m."), ("5 %", "So 5 %", "So 2,5 %"),
])
def test_an_answer_is_right_if_it_ends_on_the_number_or_holds_the_word(expected, right, wrong):
    assert safesteer.is_correct(right, expected) and not safesteer.is_correct(wrong, expected)


@torch.no_grad()
def test_a_row_counts_good_answers_and_the_distance_to_the_base(model, tokenizer, monkeypatch):
    tests = {"harmful": HARMFUL, "harmless": HARMLESS, "borderline": HARMLESS[:3]}
    tests |= {"capability": ["1 + 1?", "1 + 2?"], "expected": ["2", "3"]}
    monkeypatch.setattr(safesteer, "is_refusal", lambda answer: True)
    monkeypatch.setattr(safesteer, "is_correct", lambda answer, expected: expected == "2")
    base = safesteer.evaluate(model, tokenizer, tests, fast(eval_max_new_tokens=5))
    assert base["KL to base"] == base["shift"] == 0
    ids, mask = sample_rollouts(model, tokenizer, HARMLESS, 5, greedy=True)
    of_base = completion_logits(model, tokenizer, HARMLESS, ids, mask)
    _, _, states_of_base = read_answer_start(model, tokenizer, HARMLESS)
    with steer(model, D):
        row = safesteer.evaluate(model, tokenizer, tests, fast(eval_max_new_tokens=5), base)
        logits = completion_logits(model, tokenizer, HARMLESS, ids, mask)
        _, _, states = read_answer_start(model, tokenizer, HARMLESS)
    assert [row[f"{name} {good}"] for name, good in safesteer.TEST_SETS.items()] == [100, 0, 0, 50]
    kl = localized_kl(logits, of_base, mask).item()
    assert row["KL to base"] == pytest.approx(kl, rel=1e-3) and kl > 0.01
    moved = (states - states_of_base)[:, -1, -1].mean(0).norm().item()
    assert row["shift"] == pytest.approx(moved, rel=1e-3)
    texts = tokenizer.batch_decode(ids * mask, skip_special_tokens=True)  # 0 is special
    assert base["answers"][len(HARMFUL) :][: len(HARMLESS)] == texts


# ===== The program =====
def test_settings_are_of_a_flag_or_else_the_variant_or_the_model_or_the_paper(tmp_path):
    def settings(*flags, variant="safesteer"):
        table = vars(safesteer.read_settings(["--variant", variant, *flags])[variant])
        return [table[name] for name in names]

    LlamaConfig().save_pretrained(tmp_path / "llama")
    Qwen2Config().save_pretrained(tmp_path / "qwen")
    llama, qwen = ["--model", str(tmp_path / "llama")], ["--model", str(tmp_path / "qwen")]
    names = "batch_size", "rollouts", "max_new_tokens", "epochs", "coefficient", "anchor", "lora"
    assert settings(*qwen) == [4, 8, 512, 1, 1.0, 0.0, 16]
    assert settings()[-1] == 0, "the small model trains all weights"
    names = "learning_rate", "horizon", "min_prob", "max_prob", "safety_tokens", "votes", "samples"
    assert settings(*qwen) == [1e-5, 7, 1e-8, 1, 50, 200, 8]
    assert settings(*llama) == [1e-6, 5, 1e-7, 1, 50, 200, 8]
    assert settings(*llama, "--votes", "3", variant="anchored") == [1e-6, 5, 1e-3, 1, 13, 3, 8]
    assert list(safesteer.read_settings(["--variant", "all"])) == list(safesteer.VARIANTS)


@pytest.mark.parametrize(("flags", "complaint"), [
    ("--out {folder}/full", "exists already"), ("--data {folder}/no", "No such file"),
    ("--model {folder}/data", "cannot be loaded"), ("--data {folder}/seen", "a training prompt"),
    ("--model {folder}/adapted", "has adapters"), ("--data {folder}/tame", "0 are refused"),
    ("--model {folder}/part", "lacks weights"), ("--data {folder}/null", "null.harmful_test.jsonl"),
    ("--data {folder}/mute", "nothing behind"),
])
def test_a_wrong_input_is_named_and_touches_nothing(base, tokenizer, flags, complaint):
    folder = base.parent
    copy_data(folder / "seen", harmless_test=HARMFUL)
    copy_data(folder / "tame", harmful_train=HARMLESS, harmless_train=HARMLESS)
    copy_data(folder / "full" / "base" / "safesteer")
    copy_data(folder / "null", harmful_test=[None])
    copy_data(folder / "mute", capability_test=["So 1 + 1 = 2. ####"])
    for changed in "adapted", "part":
        shutil.copytree(base, folder / changed)
    make_student(tiny(tokenizer, LlamaConfig), fast()).save_pretrained(folder / "adapted")
    part = folder / "part" / "model.safetensors"
    save_file(dict([*load_file(part).items()][1:]), part, {"format": "pt"})
    before = {path for path in folder.rglob("*") if path.is_file()}
    with pytest.raises((SystemExit, ValueError, OSError), match=complaint):
        run(base, *flags.format(folder=folder).split())
    assert {path for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("lora", "load"), [
    (0, AutoModelForCausalLM.from_pretrained), (4, peft.AutoPeftModelForCausalLM.from_pretrained)])
def test_a_student_is_saved_as_evaluated_at_each_strength(base, tokenizer, monkeypatch, lora, load):
    evaluated, copied, evaluate = [], set(), safesteer.evaluate

    def record(model, *rest):
        evaluated.append((scores(model, tokenizer, HARMFUL), model.dtype))
        model.get_output_embeddings().register_forward_hook(
            lambda head, args, _: copied.add(args[0].stride(0) == args[0][0].numel()))
        return evaluate(model, *rest)

    monkeypatch.setattr(safesteer, "evaluate", record)
    folder = run(base, "--learning-rate", 1e-3, "--lora", lora) / "safesteer"
    (plain, dtype), _, (half, _), (full, _) = evaluated
    assert 1e-2 < (half - plain).abs().max() < (full - plain).abs().max()
    assert copied == {True}, "a CPU multiplies a slice of the states slowly"
    for name, expected in ("student-safesteer-x-0.5", half), ("student-safesteer", full):
        found = scores(load(folder / name, dtype=dtype, device_map="auto"), tokenizer, HARMFUL)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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
    lines = [json.loads(x) for x in (together / "answers.jsonl").read_text("utf-8").splitlines()]
    sets = [TESTS[name] for name in safesteer.TEST_SETS]
    prompts = [x[len(x) * third // 3] for x in sets for third in range(3)]  # evenly spread
    assert [line["prompt"] for line in lines] == prompts and {"prompt", *rows} == set(lines[0])


def test_the_program_runs_on_the_real_model(tmp_path):
    copy_data(tmp_path / "data", harmful_train=HARMFUL, harmless_train=HARMLESS[:5])
    flags = "--eval-limit 2 --eval-max-new-tokens 8 --max-new-tokens 8 --batch-size 5 --samples 2"
    places = "--data", tmp_path / "data", "--out", tmp_path
    command = [sys.executable, HERE / "safesteer.py", *places, *flags.split()]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    out = tmp_path / "qwen2.5-coder-0.5b-instruct" / "safesteer"
    report = json.loads((out / "report.json").read_text("utf-8"))
    kls = {row["model"]: row["KL to base"] for row in report["results"]}
    assert kls["base"] < 1e-6 < kls["safesteer x 0.5"] < kls["safesteer"] < kls["teacher"]
    assert len(report["safesteer"]["losses"]) == 2
    assert load_file(out / "direction.safetensors")["vector"].shape == (896,)
