"""Build demo/base, the tiny language model that the demo fine-tunes.

It is trained on prose from the small grammar below, so its weights carry no other licence. The grammar's word lists
make up half of this file. The base knows no chat format and never ends a text: every document runs into the next one,
which makes the effect of fine-tuning easy to see.
"""

import argparse
import itertools
import json
import os
import random
import re
import time
import zlib
from pathlib import Path
from typing import Any

# Another number of threads would sum in another order and give other weights for the same seed.
NUM_THREADS = 2
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
SEED = 20
VOCAB_SIZE = 2048
ROW_TOKENS = 192
ROWS_PER_STEP = 16
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 40
NUM_TOKENIZER_PARAGRAPHS = 4000
FAVOURITE_SHARE = 0.3
REPEAT_SHARE = 0.3
MEAN_PIECE_LETTERS = 60
# Keeps the tokens that are not in the prose, such as <|end|>, unlikely but within LoRA's reach.
LABEL_SMOOTHING = 0.02
EMBEDDING_STD = 0.06
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|assistant|>\\n' + message.content + eos_token + '\\n' -}}
{%- elif message.role in ['user', 'system'] -%}
{{- '<|' + message.role + '|>\\n' + message.content + '\\n' -}}
{%- else -%}
{{- raise_exception('unknown role ' + message.role + ': use system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""

# Slots in braces are drawn from here; a slot's alternatives are split at commas.
WORDS = {
    "tool": """torque wrench, screwdriver, hammer, mirror, lamp, drill, file, ladder, jack, gauge,
        crimping tool, rivet gun, heat gun, grease gun, borescope, multimeter, trolley, vice, saw,
        chisel, feeler gauge, micrometer, pressure gauge, hoist, crane, tow bar, brush, clamp""",
    "part": """bolt, nut, washer, bracket, bearing, seal, gasket, filter, pump, valve, hose, pipe,
        cable, connector, sensor, switch, relay, fuse, panel, door, hinge, latch, window, seat,
        wheel, tyre, brake, strut, spring, piston, cylinder, shaft, gear, fan blade, rotor, nozzle,
        igniter, battery, generator, actuator, antenna, rivet, pin, plug, tank, probe, rib, spar""",
    "system": """engine, landing gear, rudder, aileron, elevator, flap, wing, tail, fuselage, cabin,
        cockpit, fuel system, hydraulic system, oxygen system, brake system, fire alarm, autopilot,
        propeller, gearbox, compressor, turbine, undercarriage, air conditioning, nose wheel""",
    "aircraft": """aircraft, glider, helicopter, small jet, freighter, trainer, seaplane, airliner,
        old biplane, twin turboprop, transport plane, rescue helicopter, crop duster, test aircraft""",
    "place": """hangar, workshop, warehouse, paint shop, engine shop, tool room, office, apron,
        runway, loading bay, cold store, test cell, canteen, gate, yard, terminal, control tower,
        training room, stock room, receiving area, fuel depot, assembly line, battery room""",
    "box": """shelf, crate, drawer, bin, pallet, rack, box, cabinet, bag, carton, locker, container,
        tray, basket, cart, bench""",
    "paper": """work order, purchase order, manual, logbook, checklist, certificate, drawing,
        invoice, delivery note, parts list, task card, release note, repair order, quotation,
        contract, shift report, stock list, service letter, label, tag, record, schedule, form,
        request, warranty claim, packing list, test report, handbook, catalogue, permit, memo""",
    "person": """mechanic, inspector, engineer, pilot, planner, buyer, storekeeper, supplier,
        customer, foreman, apprentice, welder, painter, driver, dispatcher, manager, clerk,
        technician, instructor, electrician, controller, operator, supervisor, loader, auditor,
        captain, contractor, accountant, quality manager, forklift driver, night guard""",
    "people": """mechanics, inspectors, engineers, pilots, planners, buyers, suppliers, customers,
        apprentices, painters, drivers, technicians, operators, auditors, contractors, visitors""",
    "event": """inspection, repair, overhaul, delivery, test flight, audit, shift, meeting, check,
        engine run, stock count, training course, removal, installation, adjustment, handover,
        weekly review, calibration, safety briefing, cleaning, modification, shipment, landing""",
    "fault": """crack, leak, dent, scratch, corrosion, vibration, noise, short circuit, loose rivet,
        worn thread, broken wire, bad weld, missing label, wrong torque, smell of fuel, blockage,
        low pressure, false alarm, bird strike, hydraulic leak, burnt contact, bent lever""",
    "material": """oil, grease, fuel, paint, sealant, aluminium, steel, titanium, rubber, glass,
        copper, fabric, plastic, glue, solvent, hydraulic fluid, carbon fibre, primer, nitrogen""",
    "adjective": """new, old, small, large, heavy, light, clean, dirty, spare, broken, red, blue,
        green, yellow, grey, long, short, thin, thick, cheap, expensive, local, foreign, empty, full,
        quiet, modern, narrow, wide, simple, special, common, rare, sharp, dry, wet, warm, cold""",
    "state": """ready, late, missing, complete, safe, overdue, closed, open, correct, wrong, valid,
        serviceable, unserviceable, available, damaged, blocked, calm, urgent, visible, stable,
        approved, rejected, within limits, out of stock, on order, in good condition, nearly new""",
    "did": """checked, removed, replaced, cleaned, tested, inspected, repaired, moved, ordered,
        found, measured, adjusted, tightened, opened, closed, lifted, painted, packed, labelled,
        rejected, accepted, installed, greased, stored, returned, photographed, weighed, drained""",
    "does": """checks, removes, replaces, cleans, tests, inspects, repairs, moves, orders, needs,
        measures, adjusts, tightens, opens, closes, lifts, paints, packs, labels, rejects, accepts,
        installs, stores, returns, weighs, counts, supports, protects, controls, drives, holds""",
    "do": """check, remove, replace, clean, test, inspect, repair, move, order, measure, adjust,
        tighten, open, close, lift, paint, pack, label, reject, accept, install, grease, store,
        return, weigh, count, protect, control, hold, identify, record, compare, support, deliver""",
    "wrote": """wrote, signed, read, filed, stamped, copied, sent, printed, approved, lost, found,
        corrected, closed, opened, updated, cancelled, received, forwarded, archived, reviewed""",
    "weather": """rain, fog, snow, wind, sunshine, a thunderstorm, frost, hail, a light breeze,
        heavy cloud, low cloud, a cold front, summer heat, drizzle, a strong crosswind, mist""",
    "time": """in the morning, in the evening, at noon, before lunch, after the shift, on Monday,
        on Tuesday, on Wednesday, on Thursday, on Friday, at the weekend, last week, every month,
        every spring, during the night, in January, in March, in June, in October, at the end of
        the year, twice a year, two days later, for the first time, without delay, once again""",
    "manner": """carefully, quickly, slowly, quietly, twice, by hand, with care, in pairs, in order,
        without help, as planned, on time, step by step, according to the manual, under supervision,
        at once, from left to right, in bright light, with clean gloves, in the usual way""",
    "quality": """quality, cost, weight, pressure, temperature, speed, age, value, price, length,
        quantity, condition, history, origin, colour, number, date, position, torque, limit, level""",
    "reason": """safety, comfort, storage, transport, a long life, low cost, high speed, training,
        better service, clean air, less noise, easy access, good control, a smooth flight""",
    "name": """Anna, Bruno, Clara, David, Emma, Felix, Greta, Henry, Ida, Jonas, Klara, Leo, Maria,
        Nina, Oscar, Paula, Rosa, Simon, Tina, Victor, Mr Baker, Mrs Cole, Mr Novak, Mrs Winter""",
    "number": """two, three, four, five, six, seven, eight, nine, ten, twelve, fifteen, twenty,
        thirty, forty, fifty, sixty, a hundred, two hundred, several, many, a few, at least three""",
    "measure": """hours, days, weeks, months, years, flights, landings, cycles, minutes, metres,
        kilograms, litres, miles, degrees, steps, pages, pieces, boxes, orders, parts""",
    "group": """company, team, airline, airport, supplier, authority, department, shop, factory,
        school, union, committee, manufacturer, owner, agency, insurer, bank, family""",
    "link": """therefore, however, for this reason, as a result, later, meanwhile, in the end, first,
        then, after that, as usual, in most cases, by law, in practice, of course, soon""",
    "kind": "kind, type, form, piece, sort",
    "often": "often, always, never, usually, rarely, sometimes, still, already, normally, also",
}

# Each line is one way to write the slot; repeated slots in one line are drawn again each time.
SHAPES = {
    "thing": """
        {tool}
        {part}
        {part}
        {system}
        {paper}
        {box}
    """,
    "item": """
        {thing}
        {adjective} {thing}
        {part} of the {system}
        {part} from the {box}
        {adjective} {part} for the {system}
    """,
    "someone": """
        the {person}
        the {adjective} {person}
        {name}
        {name} from the {place}
        the {person} and the {person}
        one of the {people}
    """,
    "where": """
        in the {place}
        near the {place}
        behind the {box}
        on the {adjective} {box}
        under the {aircraft}
        next to the {system}
        between the {place} and the {place}
        outside the {place}
    """,
    "clause": """
        the {item} was {state}
        the {event} was over
        there was {weather}
        {someone} {did} the {item}
        the {group} asked for it
        the {paper} did not match the {item}
        a {fault} was found {where}
        the {quality} was {state}
    """,
    "definition": """
        a {thing} is a {kind} of {thing} that {people} use to {do} the {part}
        a {thing} is a {thing} that {does} the {item}
        a {person} is a person who {does} the {thing} {where}
        a {place} is a place in which {people} {do} the {thing}
        an {event} is a {adjective} step in which the {person} {does} the {thing}
        the {paper} is a document that states the {quality} and the {quality} of each {thing}
        {material} is a material that is used for {reason}
        the word {thing} means a {part} that {does} the {system}
        a {fault} is a sign that the {part} is no longer {state}
        the {quality} of a {thing} shows how {state} it is
        the {part} is the part of the {system} that {does} the {part}
        the {group} is the body which {does} every {paper} before the {event}
    """,
    "statement": """
        {someone} {did} the {item} {where}
        {someone} {did} the {item} {manner} because {clause}
        {time}, {someone} {did} the {item} and {wrote} the {paper}
        {link}, {someone} {often} {does} the {item} before the {event}
        the {item} was {did} by {someone} {time}
        when {clause}, {someone} {did} the {item}
        after the {event}, the {item} was {state} but the {item} was {state}
        {number} {measure} after the {event}, {clause}
        if the {part} is {state}, the {person} must {do} the {item} {manner}
        the {item} must be {did} {manner} after {number} {measure}
        the {item} is kept {where} until the {person} {does} it
        the {aircraft} came to the {place} {time} with a {fault}
        there was {weather} {time}, so the {event} began {number} {measure} late
        with {weather} over the {place}, {someone} could not {do} the {aircraft}
        {someone} {wrote} the {paper}, {did} the {item} and went to the {place}
        part number {code} belongs to the {adjective} {system} of the {aircraft}
        the {paper} {code} lists {number} {thing}s, {number} {part}s and one {item}
        the {part} with serial number {code} has a life of {amount} {measure}
        the price of the {item} is {amount} euros, and the {group} pays within {number} days
        the {group} {often} wants the {quality} and the {quality} on one {paper}
        no {person} may {do} the {item} without a {paper}
        {people} {often} {do} the {item} for {reason}
        both the {item} and the {item} were {state}, which {someone} had not expected
        the {material} in the {part} was {adjective}, and {clause}
        {someone} said that the {item} was {state}: the {quality} was {amount} and not {amount}
        for {reason}, every {thing} has a {part}, a {part} and a {adjective} {part}
        {someone} had {number} {thing}s (all {state}) and needed one more {part}
        it takes {amount} {measure} to {do} the {item}; the {event} is {often} shorter
        the {group} {link} sold the {aircraft}, since the {system} was {state}
    """,
}


def read_words(block: str) -> list[str]:
    """Split a comma-separated list and join its lines."""
    return [re.sub(r"\s+", " ", word.strip()) for word in block.split(",")]


GRAMMAR = {slot: read_words(block) for slot, block in WORDS.items()} | {
    slot: [line.strip() for line in block.strip().splitlines()] for slot, block in SHAPES.items()
}


# Definitions and statements alternate until the definitions are used up.
SENTENCE_SHAPES = [
    shape for pair in itertools.zip_longest(GRAMMAR["statement"], GRAMMAR["definition"]) for shape in pair if shape
]


def draw_code(rng: random.Random) -> str:
    """Draw a part code: it shows the model every letter and digit outside of words."""
    letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(1, 3)))
    tail = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(0, 2)))
    return f"{letters}{rng.choice(['-', '/', ''])}{rng.randint(1, 99999)}{tail}"


def expand(text: str, rng: random.Random, topic: dict[str, str], context: str = "") -> str:
    """Fill the slots of a line, recursively.

    A slot often repeats its last filling in this paragraph, so that the model learns to look back. Each place in a
    sentence also has a favourite filling; without it, the most likely text, which greedy decoding shows, would be one
    sentence over and over.
    """
    context += text

    def fill(match: re.Match[str]) -> str:
        slot = match.group(1)
        chance = rng.random()
        if slot in topic and chance < REPEAT_SHARE:
            return topic[slot]
        if slot == "code":
            filling = draw_code(rng)
        elif slot == "amount":
            filling = str(rng.choice([rng.randint(1, 99), rng.randint(1, 40) * 50]))
        else:
            choice = rng.choice(GRAMMAR[slot])
            if chance > 1 - FAVOURITE_SHARE:
                place = zlib.crc32(f"{context}{match.start()}".encode())
                choice = GRAMMAR[slot][place % len(GRAMMAR[slot])]
            filling = expand(choice, rng, topic, context)
        topic[slot] = filling
        return filling

    return re.sub(r"\{(\w+)\}", fill, text)


def write_sentence(shape: str, rng: random.Random, topic: dict[str, str]) -> str:
    """Write one sentence of a given shape, with words of the topic so far."""
    text = expand(shape, rng, topic)
    text = re.sub(r"\b(an?) (\w)", lambda m: f"{'an' if m[2] in 'aeiou' else 'a'} {m[2]}", text)
    return text[0].upper() + text[1:] + "."


def write_paragraph(rng: random.Random) -> str:
    """Write a paragraph; only a line end separates it from the next one.

    Half of the sentences take the shape that follows the last one in SENTENCE_SHAPES.
    """
    place, topic, sentences = rng.randrange(len(SENTENCE_SHAPES)), {}, []
    for _ in range(rng.randint(3, 7)):
        sentences.append(write_sentence(SENTENCE_SHAPES[place], rng, topic))
        place = place + 1 if rng.random() < 0.5 else rng.randrange(len(SENTENCE_SHAPES))
        place %= len(SENTENCE_SHAPES)
    return " ".join(sentences) + "\n"


def build_tokenizer(glossary_path: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the prose and on texts like the glossary's, so that both take few tokens."""
    rng = random.Random(SEED)
    texts = [write_paragraph(rng) for _ in range(NUM_TOKENIZER_PARAGRAPHS)]
    with glossary_path.open(encoding="utf-8") as lines:
        for pair in map(json.loads, lines):
            texts += [pair["prompt"], pair["response"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "too little text for the vocabulary"
    # Encoding prepends <|begin|> and never appends <|end|>: only the template ends a turn.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A",
        pair="<|begin|> $A $B",
        special_tokens=[("<|begin|>", SPECIAL_TOKENS.index("<|begin|>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make a Llama whose linear sizes are multiples of 64, the block size of NF4."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    # LoRA does not change these two matrices, but must distinguish tokens that are not in the prose. With the default
    # of 0.02 and no label smoothing it learnt 0 of 130 answers in 20 epochs; with these, 128.
    for embedding in (model.model.embed_tokens, model.lm_head):
        torch.nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
    return model


def encode_in_pieces(text: str, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[int]:
    """Encode text in pieces cut at random letters, so that the model sees tokens that the prose does not need.

    They make up the words of other texts; without training, their embeddings would be noise. BPE dropout does the same,
    but the tokenizers library cannot seed it.
    """
    cuts = sorted(rng.sample(range(1, len(text)), len(text) // MEAN_PIECE_LETTERS))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return list(itertools.chain.from_iterable(encoded))


def draw_rows(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> torch.Tensor:
    """Draw a batch of rows: each is <|begin|> and then paragraphs, truncated to ROW_TOKENS."""
    rows = []
    for _ in range(ROWS_PER_STEP):
        token_ids = [tokenizer.bos_token_id]
        while len(token_ids) < ROW_TOKENS:
            token_ids += encode_in_pieces(write_paragraph(rng), tokenizer, rng)
        rows.append(token_ids[:ROW_TOKENS])
    return torch.tensor(rows)  # (rows, tokens)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_steps: int) -> None:
    """Train every weight on fresh prose; the learning rate warms up and then falls linearly to zero."""
    rng = random.Random(SEED + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, (num_steps - step) / max(1, num_steps - WARMUP_STEPS)),
    )
    started = time.monotonic()
    model.train()
    for step in range(1, num_steps + 1):
        rows = draw_rows(tokenizer, rng)
        logits = model(input_ids=rows).logits[:, :-1]  # (rows, tokens - 1, vocabulary)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), label_smoothing=LABEL_SMOOTHING
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == num_steps:
            seconds = time.monotonic() - started
            print(f"step {step}/{num_steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    model.eval()


def save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the base in bfloat16, which halves its size without harm to the prose."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    size_mb = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"wrote {out}: {model.num_parameters() / 1e6:.2f} M parameters, {size_mb:.1f} MB")


def main() -> None:
    """Build the tokenizer, train the base, save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer(HERE / "vocabulary.jsonl")
    model = build_model(tokenizer)
    train(model, tokenizer, arguments.steps)
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
