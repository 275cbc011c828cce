"""What a W&B server makes different: the tests of native stores that are run on one (``places``), and those that cannot be.

A server has rules of its own, and no means for some of what a native store does. Each test that is left out is named with why;
``test_differences`` sees to it that no name is of the past.
"""

from __future__ import annotations

_OBJECTS = "it reaches into the objects of a native store"
_SEMVER = "a W&B server has no semantic versions, which Comet's interface is made of"
_DIGESTS = "digests are MD5 there, or XXH128 where the server takes it, and not the content ids of the default"
_MODES = "a manifest has no executable bits and no empty directories"
_RULES = "the server decides: what equals any version is that one, and `latest` goes back to it"
_GONE = "the server does not tell what was deleted from what never was"
_SWAP = "the server has no conditional writes: of two edits at one moment the later one counts"
_PARTS = "the server joins the parts: its digest, its rule for two of one path, its record"
_SETTINGS = "settings of an entity are the server's"
_NUMBERS = "whether numbers of deleted collections are used again is the server's choice"
_BASE = "the server does not record which version another one was derived from"

ON_WANDB: dict[str, dict[str, str]] = {
    "test_guide": {
        "test_comet_make_one_and_log_it": _SEMVER,
        "test_comet_use_it": _SEMVER,
        "test_comet_download_over_other_files": _SEMVER,
        "test_comet_change_it_and_log_it_again": _SEMVER,
        "test_comet_update_aliases_and_tags": _SEMVER,
        "test_comet_remote_assets": _SEMVER,
    },
    "test_run": {
        "test_defaults": "the entity of who gives none is the one that the server knows the caller by",
    },
    "test_artifact": {
        "test_a_draft_has_the_digest_of_its_version": _DIGESTS,
        "test_digests_with_everything_in_it": _DIGESTS,
        "test_http_references": _DIGESTS,
        "test_entries_of_other_artifacts": _GONE,
        "test_add_dir": _MODES,
        "test_remove": _MODES,
        "test_drafts_against_a_model": "names with line breaks are refused",
        "test_incremental_from_many_threads": _SWAP,
        "test_concurrent_edits_merge_or_conflict": "tags come in the server's order",
        "test_no_edit_is_lost_between_threads": _SWAP,
        "test_a_failed_commit_can_be_tried_again": _OBJECTS,
        "test_a_damaged_store_is_an_error_not_wrong_bytes": _OBJECTS,
        "test_delete": _GONE,
        "test_a_deleted_version_gets_no_alias": _GONE,
    },
    "test_links": {
        "test_numbers_and_aliases_are_each_collections_own": _RULES,
        "test_a_link_has_the_semantic_version_of_its_source": _SEMVER,
        "test_links_go_with_their_source": _GONE,
        "test_a_source_that_is_deleted_while_it_is_linked": _GONE,
        "test_a_name_that_becomes_both_at_one_moment": _OBJECTS,
        "test_registries_of_an_organization": _SETTINGS,
        "test_a_collections_description_tags_and_type": _OBJECTS,
        "test_a_change_of_type_that_died_is_mended": "the server changes the type of a collection at once",
        "test_a_portfolio_is_copied_as_the_versions_it_links_to": _OBJECTS,
        "test_deleting_a_portfolio_leaves_the_sources": _NUMBERS,
        "test_deleting_a_sequence_deletes_its_versions_and_links": _NUMBERS,
        "test_unknown_keys_are_kept": _OBJECTS,
        "test_records_of_older_stores": _OBJECTS,
        "test_a_damaged_link": _OBJECTS,
        "test_commands": _SETTINGS,
    },
    "test_media": {},
    "test_lineage": {
        "test_the_graph": _BASE,
        "test_the_tree": _BASE,
        "test_deleted_versions_and_runs": _OBJECTS,
    },
    "test_distributed": {
        "test_many_processes_make_one_version": _PARTS,
        "test_what_is_added_later_is_of_the_next_version": "a part cannot be laid over a version",
        "test_arguments": _PARTS,
        "test_one_path_with_two_contents": _PARTS,
        "test_digests_are_those_of_the_whole": _PARTS,
        "test_a_finish_that_died_is_carried_on": _OBJECTS,
        "test_another_process_finishes_what_one_died_over": _OBJECTS,
        "test_gc_keeps_parts_until_they_are_given_up": _OBJECTS,
        "test_a_part_of_a_deleted_artifact": _GONE,
        "test_the_record_keeps_unknown_keys": _OBJECTS,
    },
}
"""By module, the tests that are not run on a W&B server. A module that is not here is run on native stores alone."""


def stands(module: str, test: str) -> bool:
    """Whether a test of a module is run on a W&B server."""
    return module in ON_WANDB and test not in ON_WANDB[module]
