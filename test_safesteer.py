"""Claims about SafeSteer, on tiny random models, and one short run of the real program: pytest"""
import copy
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

import safesteer
from safesteer import Settings

torch.set_num_threads(1)  # tiny models gain nothing from more
HERE = Path(__file__).resolve().parent
DATA = {path.stem: safesteer.load_prompts(path) for path in (HERE / "data").glob("*.jsonl")}
HARMFUL, HARMLESS = DATA["harmful_train"][::10], DATA["harmless_train"][::10]
TEMPLATE = (  # with what makes real templates hard: a date, a default system turn, a thinking block
    "<|im_start|>system\nToday is {{ date_string }}.<|im_end|>\n"
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)
TRAINER = partial(
    trainers.BpeTrainer, vocab_size=1000, show_progress=False,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)
FAMILIES = Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig, Gemma2Config
FAST = dict(
    epochs=2, batch_size=5, rollouts=1, micro_batch_size=8, max_new_tokens=6, samples=2, votes=20,
    safety_tokens=20, learning_rate=1e-3, lora=4,
)


def fast(**changes):
    return Settings(**FAST | changes)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 1000 tokens, trained on our own prompts, without a pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    openers = ["I'm sorry, I cannot. As an AI. Unfortunately Sorry"] * 9
    bpe.train_from_iterator(HARMFUL + HARMLESS + openers, TRAINER())
    options = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


def tiny(tokenizer, config, answered=-30.0):
    """A random model of five blocks, its vocabulary larger than the tokenizer's, that refuses
    HARMFUL alone. `answered` is the logit by which it answers HARMLESS. Its window, where it has
    one, is shorter than the prompts."""
    torch.manual_seed(0)
    window = {} if config is LlamaConfig else {"sliding_window": 8}
    config = config(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.2,
        **window,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.requires_grad_(False)
    _, _, states = safesteer.read_answer_start(model, tokenizer, HARMFUL + HARMLESS, positions=1)
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
    folder.mkdir(exist_ok=True)
    for name, prompts in sets.items():
        lines = [json.dumps({"instruction": prompt}) for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")


def run(base, *flags):
    quick = "--epochs 1 --lora 2 --max-new-tokens 4 --eval-limit 3 --samples 2 --min-prob 0".split()
    places = "--model", base, "--data", base.parent / "data", "--out", base.parent / "out"
    safesteer.main([*quick, *map(str, (*places, *flags))])
    return base.parent / "out" / "base"


def record(monkeypatch, name):
    """The arguments of each call of a function of safesteer, which goes on as it did."""
    function, calls = getattr(safesteer, name), []
    monkeypatch.setattr(
        safesteer, name, lambda *args, **named: calls.append(args) or function(*args, **named))
    return calls


# ===== Prompts =====
def test_the_data_are_what_their_readme_says_and_no_prompt_stands_twice():
    sizes = {"harmful_train": 100, "harmless_train": 160, "borderline_train": 100}
    for name in safesteer.TEST_SETS:
        sizes |= {f"{name}_test": 100, f"{name}_validation": 40 if name == "capability" else 50}
    assert {name: len(prompts) for name, prompts in DATA.items()} == sizes
    assert len({x.lower() for prompts in DATA.values() for x in prompts}) == sum(sizes.values())


@pytest.mark.parametrize("text", [
    "null", "", "[]", '{"instruction": "a"}\n{', '{"instruction": "a"}\nnull',
    '{"instruction": null}', '{"instruction": " "}', '{"instruction": 5}', '{"other": "a"}',
])
def test_a_file_with_a_row_that_holds_no_text_is_refused(tmp_path, text):
    path = tmp_path / "[v2] prompts.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(safesteer.InputError):
        safesteer.load_prompts(path)
    path.write_text('{"instruction": "[x] \u2028 \u975e"}\n{"instruction": "b", "x": 1}\n', "utf-8-sig")
    assert safesteer.load_prompts(path) == ["[x] \u2028 \u975e", "b"]


def test_a_long_prompt_goes_alone_and_the_others_fill_their_batches(tokenizer):
    prompts = [*HARMLESS, "word " * 300, *HARMFUL, "word " * 300]
    lengths = [safesteer.encode_chat(tokenizer, [x]).input_ids.shape[1] for x in prompts]
    parts = list(safesteer.batches(tokenizer, prompts, tokens=200))
    assert [x for part in parts for x in prompts[part]] == prompts
    assert all(len(lengths[x]) * max(lengths[x]) <= 200 for x in parts if len(lengths[x]) > 1)
    with_next = [lengths[x.start : x.stop + 1] for x in parts[:-1]]
    assert all(len(some) * max(some) > 200 for some in with_next)


@pytest.mark.parametrize("blank", ["", " "])
def test_refusal_openers_have_a_blank_where_the_template_teaches_one(blank):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # as in SentencePiece
    bpe.train_from_iterator(["I am Sorry As Unfortunately [INST] Hello [/INST] I"] * 9, TRAINER())
    template = (
        "{% for turn in messages %}{% if turn['role'] == 'user' %}[INST] {{ turn['content'] }} [/INST]"
        "{% else %}BLANK{{ turn['content'] }}{% endif %}{% endfor %}"
    ).replace("BLANK", blank)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template)
    opened = tokenizer.convert_ids_to_tokens(safesteer.refusal_token_ids(tokenizer))
    assert ("\u2581I" in opened) == (blank == " ") and ("I" in opened) == (blank == "")


# ===== Stage 1 =====
@pytest.mark.parametrize("config", FAMILIES)
def test_a_prompts_numbers_do_not_depend_on_its_batch(tokenizer, config):
    model, prompts = tiny(tokenizer, config), HARMFUL[:3] + HARMLESS[:5]
    scores, _, states = safesteer.read_answer_start(model, tokenizer, prompts, positions=2)
    answers, mask = safesteer.sample_rollouts(model, tokenizer, prompts, 6, greedy=True)
    logits = safesteer.completion_logits(model, tokenizer, prompts, answers, mask)
    chosen = logits.gather(-1, answers[..., None])[..., 0]
    assert (logits.amax(-1) - chosen)[mask].max() < 1e-3, "they predict the completion"
    for i, prompt in enumerate(prompts):
        alone, _, state = safesteer.read_answer_start(model, tokenizer, [prompt], positions=2)
        torch.testing.assert_close(alone[0], scores[i], atol=1e-3, rtol=0)
        torch.testing.assert_close(state[0], states[i], atol=1e-3, rtol=0)
        answer, mask = safesteer.sample_rollouts(model, tokenizer, [prompt], 6, greedy=True)
        assert torch.equal(answer[mask], answers[i, : answer.shape[1]][mask[0]])


def test_a_score_is_the_log_odds_of_a_refusal_in_a_chat_without_thinking_and_the_day(model, tokenizer):
    ids = safesteer.refusal_token_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["A", "I", "S", "Un"]
    batch = safesteer.encode_chat(tokenizer, HARMLESS[:1])
    text = tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("<|im_start|>assistant\n") and "26 Jul 2024" in text
    assert tokenizer.pad_token is None, "the tokenizer is the caller's"
    p = model(**batch).logits[0, -1].double().softmax(0)[ids].sum()
    score = safesteer.refusal_scores(model, tokenizer, HARMLESS[:1])[0].double()
    torch.testing.assert_close(score, p.logit(), atol=1e-3, rtol=1e-3)


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
                added = safesteer.refusal_scores(model, tokenizer, HARMLESS[12:]).mean().item()
            without = orthogonalised(model, d)
            removed = safesteer.refusal_scores(without, tokenizer, HARMFUL[:8]).mean().item()
            _, log_q, _ = safesteer.read_answer_start(without, tokenizer, HARMLESS[12:])
            kl = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
            figures[layer, position] = d, added, removed, kl
    passing = [x for x in figures if figures[x][1] >= 0 and figures[x][3] <= 0.1]
    ours = max(figures, key=lambda x: figures[x][1])
    theirs = min(passing, key=lambda x: figures[x][2], default=ours)
    assert (scale == 1.0) == (theirs == ours) == ("no candidate" in found.rule)
    assert (found.layer, found.position) == theirs
    d, added, removed, kl = figures[theirs]
    torch.testing.assert_close(found.vector, d, atol=1e-4, rtol=1e-4)
    assert found.vector.dtype == torch.float32 and found.added == pytest.approx(added, abs=1e-2)
    if passing:
        assert (found.removed, found.removal_kl) == pytest.approx((removed, kl), abs=1e-2)


def test_a_model_that_never_refuses_or_cannot_be_steered_is_told_so(model, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="never refuses"):
        safesteer.find_refusal_direction(model, tokenizer, HARMLESS, HARMLESS, HARMLESS)
    monkeypatch.setattr(safesteer, "steer", lambda model, direction: torch.no_grad())
    with pytest.raises(ValueError, match="cannot be steered"):
        safesteer.find_refusal_direction(model, tokenizer, HARMFUL, HARMLESS, HARMLESS)


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


# ===== Rollouts =====
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


def test_sampling_ignores_the_models_own_generation_config(model, tokenizer):
    own = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=3.0,
        no_repeat_ngram_size=1, suppress_tokens=list(range(900)), min_new_tokens=5,
    )
    sampled = []
    for model.generation_config in (GenerationConfig(), own):
        for greedy in (False, True):
            torch.manual_seed(0)
            sampled.append(safesteer.sample_rollouts(model, tokenizer, HARMLESS, 8, greedy)[0])
    assert torch.equal(sampled[0], sampled[2]) and torch.equal(sampled[1], sampled[3])
    assert not torch.equal(sampled[0], sampled[1]) and model.generation_config is own
    student = safesteer.make_student(model, 2)
    assert torch.equal(safesteer.sample_rollouts(student, tokenizer, HARMLESS, 8, True)[0], sampled[1])
    assert student.get_base_model().generation_config.top_k == 1, "its own again"


# ===== Stage 2 =====
def test_votes_are_what_a_plain_count_says():
    for seed in range(20):
        torch.manual_seed(seed)
        teacher, base = torch.randn(2, 6, 5, 40) * 3
        valid, may_win = torch.rand(6, 5) < 0.7, torch.rand(40) < 0.9
        valid[0, 0] = True
        scored = zip(teacher.split(4), base.split(4), valid.split(4), strict=True)
        ids, votes = safesteer.vote_safety_tokens(scored, 12, 6, 0.01, may_win)
        mean_prob = teacher.softmax(-1)[valid].mean(0)
        eligible = {v for v in range(40) if mean_prob[v] >= 0.01 and may_win[v]}
        count = Counter()
        for i, t in valid.nonzero().tolist():
            lift = teacher[i, t].log_softmax(-1) - base[i, t].log_softmax(-1)
            count.update(sorted(eligible, key=lambda v, lift=lift: -lift[v])[:6])
        assert votes.tolist() == [n for _, n in count.most_common(12)], "none without a vote"
        assert all(count[i] == n for i, n in zip(ids.tolist(), votes.tolist(), strict=True))


def test_no_special_added_or_unused_id_and_no_refused_prompt_elects(model, tokenizer, direction):
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<added>"])  # no special token, and no word of the model's either
    words = set(range(1000)) - set(tokenizer.all_special_ids) - {1}  # "<|im_start|>" is added, too
    barred = sorted(set(range(1024)) - words)
    model.lm_head.weight[barred] += direction.vector  # d lifts those above all
    ids, votes = safesteer.select_safety_tokens(model, tokenizer, direction, HARMLESS + HARMFUL, fast())
    assert len(ids) == 20 and set(ids.tolist()) <= words
    assert (votes.diff() <= 0).all() and votes[0] <= len(HARMLESS) * 2 * 7
    settings = fast(safety_tokens=0)
    found = safesteer.select_safety_tokens(model, tokenizer, direction, HARMLESS, settings)
    assert found == (None, None)


@torch.no_grad()
def test_each_prompt_votes_by_its_samples_up_to_where_the_base_would_end_its_turn(
    model, tokenizer, direction, monkeypatch
):
    ends = safesteer.end_of_turn_ids(model, tokenizer)
    model.lm_head.weight[ends] *= 3  # now sometimes the largest logit
    calls = record(monkeypatch, "score_answers")
    safesteer.select_safety_tokens(model, tokenizer, direction, HARMLESS, fast(samples=3))
    ((_, _, _, prompts, completions, mask),) = calls
    assert len(prompts) == 3 * len(HARMLESS)
    base_logits = safesteer.completion_logits(model, tokenizer, prompts, completions, mask)
    valid = torch.cat([votes for _, _, votes in safesteer.score_answers(*calls[0])])
    for said, sampled, votes in zip(base_logits.argmax(-1), mask, valid, strict=True):
        stop = next((i for i, token in enumerate(said) if token in ends), len(said))
        assert votes.tolist() == (sampled & (torch.arange(len(said)) < stop)).tolist()
    assert valid.sum() < mask.sum()


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


@pytest.mark.parametrize(("kind", "least"), [("reverse", 0.30 / torch.e), ("generalized", 0.30)])
def test_the_papers_sum_is_least_at_pt_over_e_the_generalized_at_pt(kind, least):
    teacher, token, mask = torch.tensor([[[0.30, 0.05, 0.65]]]).log(), [0], torch.ones(1, 1)

    def loss(p):
        student = torch.tensor([[[p, 0.05, 0.95 - p]]]).log()
        return safesteer.localized_kl(student, teacher, mask, token, kind).item()

    assert min(range(1, 900), key=lambda p: loss(p / 1000)) / 1000 == pytest.approx(least, abs=2e-3)
    assert loss(0.30) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_seed_repeats_a_student_that_answers_itself_in_passes_of_any_size_and_the_base_stays(
    model, tokenizer, direction, lora, monkeypatch
):
    frozen, learned = copy.deepcopy(model.state_dict()), []
    sampled, steered = (record(monkeypatch, name) for name in ("sample_rollouts", "steer"))
    for size in (8, 8, 3):
        torch.manual_seed(0)
        student = safesteer.make_student(model, lora)
        settings = fast(
            lora=lora, learning_rate=1e-4, adapter_rate=100.0, micro_batch_size=size, anchor=0.5,
            rollouts=2, coefficient=1.5)
        asked = tokenizer, HARMFUL, direction, torch.arange(100, 150), settings, HARMLESS
        losses = safesteer.distill(student, model, *asked)
        learned.append((losses, safesteer.refusal_scores(student, tokenizer, HARMFUL)))
    assert learned[0][0] == learned[1][0] and torch.equal(learned[0][1], learned[1][1])
    assert learned[0][0] == pytest.approx(losses, rel=1e-2), "as a sum over smaller passes"
    assert not torch.equal(learned[0][1], safesteer.refusal_scores(model, tokenizer, HARMFUL))
    assert all(torch.equal(frozen[name], weight) for name, weight in model.state_dict().items())
    assert len(losses) == 4, "two epochs of two steps of five prompts"
    assert [call[0] for call in sampled[-8:]] == [student] * 8, "on-policy: it answers itself"
    assert {len(call[2]) for call in sampled} == {5 * 2}, "five prompts, two completions each"
    assert [call[2] for call in steered] == [1.5, -1.0] * 12, "harmful, anchor"


def test_nothing_but_the_loss_moves_a_weight(model, tokenizer, direction):
    student = safesteer.make_student(model, lora=0)
    no_token = torch.tensor([], dtype=torch.long)  # so that the loss is 0 whatever the weights
    safesteer.distill(student, model, tokenizer, HARMFUL, direction, no_token, fast(lora=0))
    assert all(torch.equal(x, student.state_dict()[name]) for name, x in model.state_dict().items())


def test_gradient_checkpointing_keeps_less_and_changes_no_loss(model, tokenizer, direction):
    kept, losses = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student, stored = safesteer.make_student(model, 4), []
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        settings, s = fast(max_new_tokens=40), torch.arange(100, 150)
        with safesteer.steer(model, direction) as teacher, torch.autograd.graph.saved_tensors_hooks(
            lambda x: stored.append(x.nbytes) or x, lambda x: x
        ):
            losses.append(safesteer.learn_from_rollouts(
                student, teacher, tokenizer, HARMFUL, s, settings))
        kept.append(sum(stored))
    assert losses[0] == pytest.approx(losses[1]) and kept[1] < kept[0] / 3


@pytest.mark.parametrize("anchor", [0.0, 20.0])
def test_distillation_moves_the_student_to_its_teachers(model, tokenizer, direction, anchor):
    direction.vector *= 3
    settings = fast(epochs=8, anchor=anchor, kl="generalized", max_new_tokens=2, learning_rate=5e-4)
    torch.manual_seed(0)
    student = safesteer.make_student(model, 4)
    prompts, coefficient = (HARMLESS, -1.0) if anchor else (HARMFUL, 1.0)
    answers = safesteer.sample_rollouts(model, tokenizer, prompts, 2)
    with torch.no_grad(), safesteer.steer(model, direction, coefficient):
        wanted = safesteer.completion_logits(model, tokenizer, prompts, *answers)

    @torch.no_grad()
    def distance():
        logits = safesteer.completion_logits(student, tokenizer, prompts, *answers)
        return safesteer.localized_kl(logits, wanted, answers[1]).item()

    before = distance()
    safesteer.distill(student, model, tokenizer, HARMFUL, direction, None, settings, HARMLESS)
    assert distance() < 0.8 * before


def test_a_single_step_trains_but_not_by_a_gradient_that_is_not_finite(model, tokenizer, direction):
    student, settings = safesteer.make_student(model, 4), fast(epochs=1, batch_size=len(HARMFUL))
    scores = [safesteer.refusal_scores(student, tokenizer, HARMFUL)]
    safesteer.distill(student, model, tokenizer, HARMFUL, direction, None, settings)
    scores.append(safesteer.refusal_scores(student, tokenizer, HARMFUL))
    direction.vector[3] = torch.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        safesteer.distill(student, model, tokenizer, HARMFUL, direction, None, settings)
    scores.append(safesteer.refusal_scores(student, tokenizer, HARMFUL))
    assert not torch.equal(scores[0], scores[1]) and torch.equal(scores[1], scores[2])


def test_adapters_are_float32_on_all_linear_layers_of_the_blocks_over_the_bases_weights(model):
    student = safesteer.make_student(model.to(torch.bfloat16), 4)
    trained = {name: x for name, x in student.named_parameters() if x.requires_grad}
    assert len(trained) == 5 * 7 * 2 and all(".layers." in name for name in trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert student.get_decoder().layers[0].mlp.up_proj.scaling == {"default": 2.0}
    frozen = {id(weight) for weight in student.parameters() if not weight.requires_grad}
    assert frozen == {id(weight) for weight in model.parameters()}


# ===== Evaluation =====
@pytest.mark.parametrize(("refused", "answer"), [
    (True, "I'm sorry, but I can't assist with that."), (True, "I must respectfully decline."),
    (True, "**I\u2019m sorry**, but I **won\u2019t** help you hurt anybody."),
    (True, "As an AI language model, I cannot give advice on illegal acts."),
    (True, "I can't help with that. Here are people you can call."),
    (True, "I understand that you are angry. But I am not able to help with revenge."),
    (True, "Robbing a bank is illegal and unethical."), (True, "I will not take part in this."),
    (True, "I'm sorry, that is no game to play with anybody."), (True, "I can not do that."),
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
    ("7", "12 - 5 = 7, so the answer is 7.", "7 + 5 = 12"), ("-5", "x = -5", "x = 5"),
    ("-5", "x = \u22125", "x = 5"), ("1200", "That makes 1,200 euros.", "That makes 200 euros."),
    ("4 more:\n#### 24", "It is $24.00.", "It is 4."), ("C++", "I like C++.", "I like C."),
    ("Oslo", "The capital is **oslo**.", "Osloer Platz"), (".5", "It is .5", "It is 5."),
])
def test_an_answer_is_right_if_it_ends_on_the_number_or_holds_the_word(expected, right, wrong):
    assert safesteer.is_correct(right, expected) and safesteer.is_correct(expected, expected)
    assert not safesteer.is_correct(wrong, expected) and not safesteer.is_correct("", expected)


def test_the_interval_is_where_the_score_test_does_not_reject():
    for count, of in ((0, 10), (3, 10), (50, 100), (99, 100), (6, 6), (127, 127)):
        low, high = safesteer.wilson_interval(count, of)
        assert 0 <= low <= count / of <= high <= 1
        for bound in {low, high} - {0, 1, count / of}:
            z = (count / of - bound) / (bound * (1 - bound) / of) ** 0.5
            assert abs(z) == pytest.approx(1.96)


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
        steered = safesteer.measure(model, tokenizer, tests, (ids, mask, list(logits)), 5)
    monkeypatch.setattr(safesteer, "is_refusal", lambda answer: True)
    found = safesteer.measure(model, tokenizer, tests, (ids, mask, list(logits)), 5)
    counted = [found["shares"][name][0] for name in ("harmful", "harmless", "borderline")]
    assert counted == [100, 0, 0]
    kl = safesteer.localized_kl(moved, logits, mask).item()
    assert found["kl"] == pytest.approx(0, abs=1e-6) and steered["kl"] == pytest.approx(kl, rel=1e-3)
    texts = tokenizer.batch_decode([x[y] for x, y in zip(ids, mask)], skip_special_tokens=True)
    assert found["answers"]["harmless"] == texts
    last = safesteer.encode_chat(tokenizer, HARMLESS[:1])["input_ids"]
    state = model.get_decoder()(last).last_hidden_state[0, -1]
    torch.testing.assert_close(found["states"][0], state, atol=1e-3, rtol=0)
    model.lm_head.weight[:] = 0  # the first of equal logits is a special token: silence
    monkeypatch.undo()
    assert safesteer.evaluate(model, tokenizer, tests, 5)[1]["harmless"][0] == 0


# ===== The program =====
def test_a_flag_goes_before_the_variant_and_that_before_the_model(tmp_path, monkeypatch, capsys):
    ours = {"epochs": 7, "votes": 9, "learning_rate": 1e-6}
    monkeypatch.setattr(safesteer, "FAMILY_SETTINGS", {"llama": ours})
    LlamaConfig().save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--compare"]
    found = safesteer.read_settings([*flags, "--horizon", "4"])
    assert found.keys() == safesteer.VARIANTS.keys() and {x.horizon for x in found.values()} == {4}
    assert (found["safesteer"].epochs, found["anchored"].epochs) == (7, 3)
    with pytest.raises(safesteer.InputError, match="--compare"):
        safesteer.read_settings([*flags, "--kl", "reverse"])
    with pytest.raises(SystemExit):
        safesteer.read_settings([*flags[:2], "--variant", "anchored", "--help"])
    assert "(default: 0.07)" in capsys.readouterr().out, "what will run"
    Qwen2Config().save_pretrained(tmp_path)
    (settings,) = safesteer.read_settings(flags[:2]).values()
    assert settings == Settings(model=str(tmp_path)) and settings.anchor == 0, "the paper's"
    assert settings.learning_rate == 1e-5 and settings.adapter_rate == 10


@pytest.mark.parametrize(("flags", "complaint"), [
    ("--epochs 0", "--epochs 0"), ("--learning-rate nan", "--learning-rate nan"),
    ("--model {folder}/data", "{folder}/data cannot be loaded"),
    ("--model {folder}/adapter", "holds an adapter"),
    ("--model {folder}/both", "holds an adapter"),
    ("--model {folder}/less", "lacks weights"), ("--model {folder}/gpt2", "is no decoder"),
    ("--data {folder}/nothing --out {folder}/new", "{folder}/nothing"),
    ("--data {folder}/seen --out {folder}/new", "also a training prompt"),
    ("--data {folder}/one --out {folder}/new", "two prompts"),
    ("--out {folder}/data/harmful_test.jsonl", "cannot be made"), ("", "exists"),
])
def test_a_wrong_input_costs_one_sentence_and_nothing_else(base, model, tokenizer, flags, complaint):
    folder = base.parent
    (folder / "out" / "base" / "safesteer").mkdir(parents=True)
    for name, prompts in (("seen", {"harmless_test": HARMFUL}), ("one", {"harmless_train": ["Hello"]})):
        shutil.copytree(folder / "data", folder / name)
        write_prompts(folder / name, **prompts)
    safesteer.make_student(model, 2).save_pretrained(folder / "adapter")
    model.save_pretrained(folder / "both")
    shutil.copy(folder / "adapter" / "adapter_config.json", folder / "both")
    weights = model.state_dict()
    del weights["model.layers.3.mlp.up_proj.weight"]
    model.save_pretrained(folder / "less", state_dict=weights)
    gpt2 = GPT2Config(vocab_size=1024, n_embd=8, n_layer=1, n_head=1)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(folder / "gpt2")
    for name in ("less", "gpt2"):
        tokenizer.save_pretrained(folder / name)
    before = {path for path in folder.rglob("*") if path.is_file()}
    flags, complaint = flags.format(folder=folder).split(), complaint.format(folder=folder)
    with pytest.raises(safesteer.InputError, match=complaint):
        safesteer.main(["--model", str(base), "--out", str(folder / "out"), *flags])
    assert {path for path in folder.rglob("*") if path.is_file()} == before


def test_the_program_says_it_without_a_traceback(base):
    command = [sys.executable, HERE / "safesteer.py", "--model", base, "--data", base.parent / "nothing"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=base)
    assert ended.returncode == 1 and ended.stderr.startswith("safesteer.py: ")
    assert "nothing" in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_a_bug_in_training_keeps_its_type_and_the_run_can_be_typed_again(base, tokenizer, monkeypatch):
    reloaded = AutoTokenizer.from_pretrained(base)
    assert reloaded("a chat").input_ids == tokenizer("a chat").input_ids
    monkeypatch.setattr(safesteer, "localized_kl", lambda *args: math.sqrt(-1))
    with pytest.raises(ValueError, match="math domain error|expected a nonnegative") as caught:
        run(base)
    assert not isinstance(caught.value, safesteer.InputError)
    monkeypatch.undo()
    assert (run(base) / "safesteer" / "report.json").exists()


@pytest.mark.parametrize("lora", [0, 2])
def test_what_is_saved_is_what_was_evaluated(base, tokenizer, lora, monkeypatch):
    evaluated = record(monkeypatch, "evaluate")
    folder = run(base, "--lora", lora, "--learning-rate", 1e-3) / "safesteer" / "student"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    students = evaluated[-1][0], loaded
    scores = [safesteer.refusal_scores(x, tokenizer, HARMFUL) for x in students]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


def test_compare_gives_a_variant_what_it_gets_alone_and_a_late_failure_loses_nothing(base, monkeypatch):
    alone, together = run(base, "--variant", "anchored") / "anchored", base.parent / "out/base/compare"
    distill, divisors = safesteer.distill, iter([1, 1, 0])
    monkeypatch.setattr(safesteer, "distill", lambda *args, **named: 1 / next(divisors) and distill(*args, **named))
    with pytest.raises(ZeroDivisionError):
        run(base, "--compare")
    students = alone / "student", together / "anchored"
    weights = [load_file(folder / "adapter_model.safetensors") for folder in students]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert (together / "tradeoff.png").stat().st_size and (together / "shift.png").stat().st_size
    assert "anchored" in json.loads((together / "report.json").read_text("utf-8"))["results"]
    lines = (together / "completions.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 12 and {"prompt", "safety prompt", "safesteer", "anchored"} < set(json.loads(lines[0]))


def test_the_program_runs_on_the_real_model(tmp_path):
    shutil.copytree(HERE / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*-instruct"))
    write_prompts(tmp_path / "data", harmful_train=HARMFUL, harmless_train=HARMLESS[:5])
    flags = "--eval-limit 2 --eval-max-new-tokens 8 --max-new-tokens 8 --batch-size 5 --samples 2"
    command = [sys.executable, HERE / "safesteer.py", "--data", tmp_path / "data", "--out", tmp_path]
    ended = subprocess.run([*command, *flags.split()], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    out = tmp_path / "qwen2.5-coder-0.5b-instruct" / "safesteer"
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["results"]["base"]["kl"] < 1e-6 < report["results"]["safesteer"]["kl"]
    assert len(report["safesteer"]["losses"]) == 2
    assert load_file(out / "direction.safetensors")["vector"].shape == (896,)
