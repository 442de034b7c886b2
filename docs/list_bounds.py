"""Write docs/bounds.md, of everything that a caller can make grow: `python docs/list_bounds.py`."""

import importlib
from pathlib import Path
from typing import NamedTuple

from registry.settings import Settings

PAGE = Path(__file__).parent / "bounds.md"
HEAD = """# Bounds

Everything that a caller can make grow, how far, what comes then, and the test that says so. Made
from the code by `docs/list_bounds.py`; variables are [settings](settings.md).

| what | at most | then | test |
|---|---|---|---|
"""


class Bound(NamedTuple):
    what: str
    most: str
    """A setting, or MODULE.CONSTANT; with the unit behind it."""
    then: str
    test: str


SERVER, GUARD = "tests/service/test_server.py", "tests/service/test_guard.py"
UPLOADS, TASKS = "tests/service/uploads/test_archives.py", "tests/service/routes/test_datasets.py"
ACCESS, RECORDS = "tests/service/test_access.py", "tests/registry/test_repository.py"

BOUNDS = [
    Bound(
        "request line and headers, trailers",
        "service.protocol.MOST_HEAD_BYTES bytes",
        "431",
        f"{SERVER}::test_a_head_without_end_is_refused",
    ),
    Bound(
        "header fields",
        "service.protocol.MOST_FIELDS fields",
        "431",
        "tests/service/test_protocol.py::test_a_head_of_too_many_fields_is_refused_by_its_status",
    ),
    Bound(
        "time until they are there",
        "service.protocol.HEAD_SECONDS s",
        "408",
        "tests/service/test_protocol.py::test_a_head_that_does_not_come_is_not_waited_for",
    ),
    Bound(
        "body of a request",
        "service.guard.MOST_BODY_BYTES bytes",
        "413",
        f"{SERVER}::test_a_body_too_large_is_not_parsed",
    ),
    Bound(
        "body of `/session`",
        "service.guard.MOST_SESSION_BYTES bytes",
        "413",
        f"{SERVER}::test_a_body_too_large_is_not_parsed",
    ),
    Bound(
        "time until a body is there",
        "service.guard.BODY_SECONDS s",
        "408",
        f"{GUARD}::test_a_body_that_does_not_come_is_not_waited_for",
    ),
    Bound(
        "fields of a request that are looked at",
        "fineserve.wire.MOST_FIELDS fields",
        "422 for their number",
        f"{SERVER}::test_thousands_of_fields_are_one_error",
    ),
    Bound(
        "reading of `/metrics`",
        "service.metrics.MOST_REST_SECONDS s",
        "told again for ten times as long as it took, and so long at most",
        "tests/service/routes/test_metrics.py::test_who_scrapes_all_the_time_is_told_the_same",
    ),
    Bound(
        "errors that an answer lists",
        "service.problems.MOST_ERRORS errors",
        "how many more there are",
        f"{SERVER}::test_the_first_of_many_errors_are_told",
    ),
    Bound(
        "connections",
        "max_connections",
        "503",
        f"{SERVER}::test_more_connections_than_may_be_come_back_later",
    ),
    Bound(
        "event streams of a key, or of a client where there are no keys",
        "service.streams.MOST_OF_KEY streams",
        "429",
        "tests/service/test_streams.py::test_a_key_has_so_many_streams",
    ),
    Bound(
        "uploads of an owner under way",
        "service.uploads.receiving.MOST_OF_OWNER uploads",
        "429",
        "tests/service/uploads/test_receiving.py::test_an_owner_has_so_many_places",
    ),
    Bound(
        "uploads of all under way",
        "service.uploads.receiving.MOST_OF_ALL uploads",
        "429",
        "tests/service/uploads/test_receiving.py::test_an_owner_has_so_many_places",
    ),
    Bound(
        "bytes of uploads under way",
        "min_free_disk_gb",
        "507 for the upload that announces more than is free besides",
        "tests/service/uploads/test_receiving.py::test_what_is_announced_needs_room",
    ),
    Bound(
        "pace of an upload, bytes a second at least",
        "service.uploads.receiving.LEAST_BYTES_PER_SECOND bytes",
        "408",
        "tests/service/uploads/test_receiving.py::test_an_upload_that_trickles_is_ended",
    ),
    Bound("an archive", "max_upload_mb", "413", f"{TASKS}::test_limits_of_uploads"),
    Bound(
        "an archive, unpacked",
        "max_unpacked_mb",
        "422",
        f"{UPLOADS}::test_links_devices_and_bombs_are_refused",
    ),
    Bound(
        "images of a task",
        "max_task_images",
        "422",
        f"{UPLOADS}::test_files_that_are_no_classes_are_refused",
    ),
    Bound(
        "classes of a task",
        "max_task_classes",
        "422",
        f"{UPLOADS}::test_files_that_are_no_classes_are_refused",
    ),
    Bound(
        "images of a task, as they are kept",
        "max_task_mb",
        "422",
        f"{UPLOADS}::test_pixels_that_are_kept_in_memory_have_a_limit",
    ),
    Bound(
        "files of an archive for each image that it may have",
        "service.uploads.archives.ENTRIES_PER_IMAGE files",
        "422",
        f"{UPLOADS}::test_an_archive_has_so_many_files",
    ),
    Bound(
        "processor time of reading an archive",
        "upload_processor_seconds",
        "422",
        f"{TASKS}::test_reading_takes_no_more_of_a_processor_than_it_may",
    ),
    Bound(
        "memory of reading an archive",
        "service.uploads.reading.MEMORY_BYTES bytes",
        "422",
        f"{TASKS}::test_reading_takes_no_more_memory_than_it_may",
    ),
    Bound("tasks of an owner", "max_tasks", "409", f"{TASKS}::test_limits_of_uploads"),
    Bound(
        "unfinished models of all",
        "max_active_models",
        "429",
        f"{ACCESS}::test_one_owner_has_a_quarter_of_the_places",
    ),
    Bound(
        "unfinished generations of all",
        "max_active_generations",
        "429",
        f"{ACCESS}::test_one_owner_has_a_quarter_of_the_places",
    ),
    Bound(
        "share of those that one owner has, unless the key says otherwise",
        "service.access.MOST_SHARE of all",
        "429",
        f"{ACCESS}::test_one_owner_has_a_quarter_of_the_places",
    ),
    Bound(
        "images of one request",
        "max_images_per_request",
        "422",
        "tests/service/routes/test_generations.py::test_a_bad_request_is_explained",
    ),
    Bound(
        "records of what failed or was cancelled",
        "registry.lifecycle.GIVEN_UP_SECONDS s",
        "they are gone",
        f"{RECORDS}::test_what_was_given_up_expires_and_leaves_the_lists",
    ),
    Bound(
        "records of generations, their images, exports",
        "image_ttl_seconds",
        "they are gone",
        f"{RECORDS}::test_what_was_given_up_expires_and_leaves_the_lists",
    ),
    Bound(
        "events of a record",
        "registry.events.MAX_EVENTS events",
        "the oldest are gone",
        f"{RECORDS}::test_the_last_events_are_kept",
    ),
    Bound(
        "idempotency keys",
        "registry.idempotency.MOST_SECONDS s",
        "they are gone; a request that was refused keeps none",
        f"{RECORDS}::test_what_was_refused_keeps_no_key",
    ),
    Bound(
        "sessions",
        "session_seconds",
        "401: sign in again",
        f"{ACCESS}::test_a_session_ends_with_its_key",
    ),
    Bound(
        "Redis's memory in use",
        "service.submission.MOST_MEMORY_SHARE of `maxmemory`",
        "507",
        "tests/service/routes/test_generations.py::test_more_artifacts_than_the_quota_are_507",
    ),
    Bound(
        "artifacts on disk",
        "max_store_gb",
        "507",
        "tests/service/routes/test_generations.py::test_more_artifacts_than_the_quota_are_507",
    ),
    Bound(
        "a path in the audit log",
        "service.guard.MOST_LOGGED characters",
        "the rest is left out",
        f"{GUARD}::test_a_long_path_is_cut_in_the_log",
    ),
    Bound(
        "files that processes count into",
        "one for each process that lives",
        "those of dead ones are taken over",
        "tests/registry/test_metrics.py::test_a_place_is_taken_over_from_a_dead_process",
    ),
]


def page() -> str:
    return HEAD + "".join(
        f"| {what} | {_most(most)} | {then} | `{test.partition('::')[2]}` |\n"
        for what, most, then, test in BOUNDS
    )


def _most(most: str) -> str:
    name, _, unit = most.partition(" ")
    if name in Settings.model_fields:
        default = Settings.model_fields[name].default
        return f"`FINESERVE_{name.upper()}`" + ("" if default is None else f", {default:,}")
    module, _, constant = name.rpartition(".")
    if not module:
        return most
    value = getattr(importlib.import_module(module), constant)
    return f"{value:,} {unit}"


if __name__ == "__main__":
    PAGE.write_text(page())
