"""CLINC150: 150 intents of requests to an assistant, and requests that have none of them.

Larson et al. 2019 (aclanthology.org/D19-1131). The official file is a JSON object of lists of ``[sentence, intent]``;
`data_full.json` and `data_small.json` differ in their training rows alone.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from .glue import Split, TsvLayout, accuracy
from .text import HubCopy, TextTask

INTENTS: tuple[str, ...] = tuple(
    """
    accept_reservations account_blocked alarm application_status apr are_you_a_bot balance bill_balance bill_due
    book_flight book_hotel calculator calendar calendar_update calories cancel cancel_reservation car_rental
    card_declined carry_on change_accent change_ai_name change_language change_speed change_user_name
    change_volume confirm_reservation cook_time credit_limit credit_limit_change credit_score current_location
    damaged_card date definition direct_deposit directions distance do_you_have_pets exchange_rate
    expiration_date find_phone flight_status flip_coin food_last freeze_account fun_fact gas gas_type goodbye
    greeting how_busy how_old_are_you improve_credit_score income ingredient_substitution ingredients_list
    insurance insurance_change interest_rate international_fees international_visa jump_start last_maintenance
    lost_luggage make_call maybe meal_suggestion meaning_of_life measurement_conversion meeting_schedule
    min_payment mpg new_card next_holiday next_song no nutrition_info oil_change_how oil_change_when order
    order_checks order_status pay_bill payday pin_change play_music plug_type pto_balance pto_request
    pto_request_status pto_used recipe redeem_rewards reminder reminder_update repeat replacement_card_duration
    report_fraud report_lost_card reset_settings restaurant_reservation restaurant_reviews restaurant_suggestion
    rewards_balance roll_dice rollover_401k routing schedule_maintenance schedule_meeting share_location
    shopping_list shopping_list_update smart_home spelling spending_history sync_device taxes tell_joke text
    thank_you time timer timezone tire_change tire_pressure todo_list todo_list_update traffic transactions
    transfer translate travel_alert travel_notification travel_suggestion uber update_playlist user_name
    vaccines w2 weather what_are_your_hobbies what_can_i_ask_you what_is_your_name what_song where_are_you_from
    whisper_mode who_do_you_work_for who_made_you yes
    """.split()
)
"""By name, which is the order of the labels."""
OUTSIDE = "oos"
"""What the files write in place of an intent where there is none."""
FILE = "data_full.json"
SPLITS = {"train": "train", "validation": "val", "test": "test"}
OUTSIDE_SPLITS = {"shifted": "oos_test", "oos_validation": "oos_val", "oos_train": "oos_train"}


def read_clinc(path: str | PathLike[str]) -> dict[str, Split]:
    """Return the splits of an official file of CLINC150, or of the folder that holds `data_full.json`.

    Args:
        path: the folder, or the file.

    Returns:
        By split the columns ``"text"`` and, but for requests out of scope, ``"label"``, a position in `INTENTS`:
        ``train``, ``validation``, ``test``, and out of scope ``shifted`` (the file's oos_test), ``oos_validation`` and
        ``oos_train`` where the file has them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, not JSON of this shape, or has an unknown intent; the message names the row.
    """
    file = _file(path)
    content = _content(file)
    known = {name: index for index, name in enumerate(INTENTS)}
    splits: dict[str, Split] = {}
    for split, key in SPLITS.items():
        rows = _rows(file, content, key)
        if unknown := [(number, intent) for number, (_, intent) in enumerate(rows, 1) if intent not in known]:
            number, intent = unknown[0]
            raise ValueError(
                f"{file}, `{key}`, row {number}: {intent!r} is not one of CLINC150's {len(known)} intents."
            )
        splits[split] = {"text": [text for text, _ in rows], "label": [known[intent] for _, intent in rows]}
    for split, key in OUTSIDE_SPLITS.items():
        if key in content:
            rows = _rows(file, content, key)
            if inside := [number for number, (_, intent) in enumerate(rows, 1) if intent != OUTSIDE]:
                wrong = rows[inside[0] - 1][1]
                raise ValueError(
                    f"{file}, `{key}`, row {inside[0]}: expected {OUTSIDE!r} as the intent, got {wrong!r}."
                )
            splits[split] = {"text": [text for text, _ in rows]}
    return splits


def _file(path: str | PathLike[str]) -> Path:
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        beside = sorted(other.name for other in file.parent.glob("*.json")) if file.parent.is_dir() else []
        raise FileNotFoundError(f"{file} does not exist. JSON files in its folder: {', '.join(beside) or 'none'}.")
    return file


def _content(file: Path) -> dict[str, Any]:
    """The JSON object, with all splits of intents."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None
    keys = ", ".join(SPLITS.values())
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold one JSON object with {keys}, got a {type(content).__name__}.")
    if missing := [key for key in SPLITS.values() if key not in content]:
        raise ValueError(f"{file} must hold {keys}; it lacks {', '.join(missing)} and has {', '.join(content)}.")
    return content


def _rows(file: Path, content: dict[str, Any], key: str) -> list[list[str]]:
    rows = content[key]
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file}: `{key}` must be a list of [sentence, intent] with a row or more, got {rows!r:.80}.")
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, list) and len(row) == 2 and all(isinstance(cell, str) for cell in row)):
            raise ValueError(f"{file}, `{key}`, row {number}: expected [sentence, intent], got {row!r:.80}.")
        if not row[0].strip():
            raise ValueError(f"{file}, `{key}`, row {number}: the sentence is empty.")
    return rows


CLINC = TextTask(
    name="clinc",
    columns=("text",),
    label_names=INTENTS,
    label_values=INTENTS,
    metrics=(accuracy,),
    tsv=TsvLayout(directory="clinc", columns=("text",), label="label"),
    read=read_clinc,
    files=FILE,
    hub=HubCopy(name="clinc/clinc_oos", config="plus", label="intent", outside=OUTSIDE),
    is_sorted=True,
)
"""The row of `TEXT_TASKS`; the shifted inputs, requests with none of its intents, are near ones."""
