"""Where links go: targets, and the registries of an organisation.

A registry is a project ``wandb-registry-<name>`` of the entity that is the organisation. Which one that is for an entity, its
settings in the store say; without any, an entity is its own organisation.
"""

from __future__ import annotations

from artifactfs.errors import UsageError
from artifactfs.model import Version
from artifactfs.names import ArtifactName, is_registry, parse
from artifactfs.store import Store


def parse_name(store: Store, text: str, entity: str, project: str) -> ArtifactName:
    """A name with its defaults; one that begins with a registry is in the organisation of ``entity``. InvalidNameError."""
    parts = text.partition(":")[0].split("/")
    if len(parts) == 2 and is_registry(parts[0]) and entity:
        entity = organization_of(store, entity)
    return parse(text, entity, project)


def link_target(store: Store, text: str, source: Version, entity: str = "", project: str = "") -> ArtifactName:
    """The portfolio that ``text``, ``[[entity/]project/]collection``, means for a link to ``source``.

    Entity and project default to those given, then the source's. A registry's entity must be the organisation of the source's, or
    left out. UsageError.
    """
    if ":" in text:
        raise UsageError(f"link target {text!r} names a version; write [[entity/]project/]collection, and give aliases apart")
    home = source.origin
    name = parse_name(store, text, entity or home.entity, project or home.project)
    if not is_registry(name.project):
        return name
    organization = organization_of(store, home.entity)
    if text.count("/") == 2 and name.entity not in (organization, home.entity):
        raise UsageError(
            f"{home.entity} belongs to the organization {organization!r} and cannot link to a registry of {name.entity!r}; "
            f"artifactfs entity {home.entity} --organization {name.entity} would change that"
        )
    return ArtifactName(organization, name.project, name.collection)


def organization_of(store: Store, entity: str) -> str:
    """The entity that holds the registries of ``entity``."""
    return store.entity_settings(entity).organization or entity
