"""What an operator copies from deploy/: read by the programs that will read it, and true to what we serve."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.support.balancers import (
    ENVOY_FILE,
    HAPROXY_FILE,
    ROOT,
    environment_of,
    envoy,
    free_port,
    haproxy,
    needs_haproxy,
    user_and_group,
)
from tests.support.doubles import Played
from tests.support.waiting import wait_for

from perfit_cloud.config import CloudConfig, load_config
from perfit_cloud.service.identity import server_authority
from perfit_cloud.service.telemetry import Engines, Telemetry

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
KUBERNETES_VERSION = "1.31"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def ran(*words: object, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | environment,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def documents() -> list[tuple[str, dict[str, Any]]]:
    """(file, object) of everything that is applied."""
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert {path.name for path in KUBERNETES.glob("*.yaml")} - set(listed) == {
        "kustomization.yaml",
        "prometheus-adapter.yaml",
    }
    return [(name, each) for name in listed for each in yaml.safe_load_all((KUBERNETES / name).read_text())]


def pods() -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for _, each in documents() if "template" in each.get("spec", {})]


def test_kubernetes_knows_every_field() -> None:
    """By the schemas of a release, and strictly: a field of a wrong name is an error."""
    validate: Any = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    ).validate
    for name, document in documents():
        validate(document, KUBERNETES_VERSION, strict=True)
        assert document["kind"] and name
    broken = next(each for _, each in documents() if each["kind"] == "Deployment")
    broken["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(Exception, match="readinessProb"):
        validate(broken, KUBERNETES_VERSION, strict=True)


def test_pods_may_little() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        assert pod["terminationGracePeriodSeconds"] >= 50  # docs/operating.md, "Stopping, restarting"
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


def test_services_budgets_and_scaling_choose_pods_that_there_are() -> None:
    labels = [
        each["spec"]["template"]["metadata"]["labels"]
        for _, each in documents()
        if each["kind"] in {"Deployment", "StatefulSet"}
    ]
    names = {each["metadata"]["name"] for _, each in documents() if each["kind"] == "Deployment"}
    for _, each in documents():
        spec = each.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector is not None:
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= one.items() for one in labels), each["metadata"]
        if each["kind"] == "HorizontalPodAutoscaler":
            assert spec["scaleTargetRef"]["name"] in names
    budgets = {each["metadata"]["name"] for _, each in documents() if each["kind"] == "PodDisruptionBudget"}
    assert budgets == names == {"answers", "updates"}


def test_pools_grow_by_metrics_that_we_have() -> None:
    rules = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    made = {rule["name"]["as"] for rule in rules}
    used = {
        metric["pods"]["metric"]["name"]
        for _, each in documents()
        if each["kind"] == "HorizontalPodAutoscaler"
        for metric in each["spec"]["metrics"]
    }
    assert used == made
    telemetry, engine = Telemetry(), Played()
    telemetry.watch(Engines(engine, engine, engine, engine))
    there = [sample for metric in telemetry.registry.collect() for sample in metric.samples]
    for rule in rules:
        name, _, labels = rule["seriesQuery"].partition("{")
        assert f"<<.LabelMatchers>>,{labels.rpartition(',')[2][:-1]}," in rule["metricsQuery"]
        (of_engine,) = re.findall(r'engine="(\w+)"', rule["metricsQuery"])
        (states,) = re.findall(r'state=~"([\w|]+)"', rule["metricsQuery"])
        of_it = [each.labels for each in there if each.name == name and each.labels["engine"] == of_engine]
        assert {each["state"] for each in of_it} == set(states.split("|"))


def test_answers_scale_out_before_callers_are_refused() -> None:
    """It went by those that wait: none do where `streams` are running and all others are refused."""
    (target,) = [
        metric["pods"]["target"]["averageValue"]
        for _, each in documents()
        if each["kind"] == "HorizontalPodAutoscaler" and each["metadata"]["name"] == "answers"
        for metric in each["spec"]["metrics"]
    ]
    assert "streams" not in settings_of_kubernetes()
    assert int(target) <= CloudConfig().streams / 2


@needs_promtool
def test_what_runs_counts_for_scaling(tmp_path: Path) -> None:
    """As the adapter asks Prometheus, for a replica with 48 answers under way of which none waits."""
    rules = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    series, cases = [], []
    for rule in rules:
        (engine,) = re.findall(r'engine="(\w+)"', rule["metricsQuery"])
        for state, count in (("running", 48), ("waiting", 0)):
            labels = f'namespace="n",pod="p",engine="{engine}",state="{state}"'
            series.append({"series": f"perfit_engine_work{{{labels}}}", "values": f"{count}x5"})
        query = rule["metricsQuery"].replace("<<.Series>>", "perfit_engine_work")
        query = query.replace("<<.LabelMatchers>>", 'namespace="n",pod=~"p|q"').replace("<<.GroupBy>>", "pod")
        cases.append(
            {"expr": query, "eval_time": "2m", "exp_samples": [{"labels": '{pod="p"}', "value": 48}]}
        )
    file = tmp_path / "adapter.test.yml"
    file.write_text(
        yaml.safe_dump({"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": cases}]})
    )
    assert "SUCCESS" in ran("promtool", "test", "rules", file)


def settings_of_kubernetes() -> set[str]:
    made = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"]
    own = [each["name"] for pod in pods() for one in pod["containers"] for each in one["env"]]
    names = [literal.partition("=")[0] for each in made for literal in each["literals"]] + own
    return {name.removeprefix("PERFIT_CLOUD_").lower() for name in names}


def test_settings_are_known() -> None:
    known = set(CloudConfig.__dataclass_fields__)
    assert settings_of_kubernetes() <= known
    for file in (DEPLOY / "systemd").glob("*.toml"):
        values = tomllib.loads(file.read_text())
        assert values.keys() <= known, file
        load_config(file=file, environment={}, flags={})


def test_each_balancer_has_a_name_of_its_own() -> None:
    """Two of them shared one: half of all devices found nobody behind a port."""
    values = dict(
        literal.split("=", 1)
        for each in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"]
        for literal in each["literals"]
    )
    dialled = [
        address
        for name in ("PUBLIC_ADDRESS", "PUBLIC_ENROL_ADDRESS")
        for address in values[f"PERFIT_CLOUD_{name}"].split(",")
    ]
    given = [
        f"{each['metadata']['annotations']['external-dns.alpha.kubernetes.io/hostname']}:{port['port']}"
        for _, each in documents()
        if each["kind"] == "Service" and each["spec"].get("type") == "LoadBalancer"
        for port in each["spec"]["ports"]
    ]
    assert sorted(dialled) == sorted(given)
    hosts = [address.rpartition(":")[0] for address in dialled]
    assert len(set(hosts)) == len(hosts)


def test_systemd_reaches_the_database_over_checked_tls() -> None:
    """No root was named, and libpq looked for one in the home that the units hide."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    from psycopg.conninfo import conninfo_to_dict

    roles = (DEPLOY / "postgres/roles.sql").read_text()
    for name in ("enrolment", "replica"):
        found = conninfo_to_dict(tomllib.loads((DEPLOY / "systemd" / f"{name}.toml").read_text())["database"])
        assert found["sslmode"] == "verify-full"
        assert str(found["sslrootcert"]).startswith("/etc/perfit/")
        assert f"'{found['user']}'" in roles and "password" not in found
        assert (
            "\nEnvironment=PGPASSFILE=/etc/perfit/" in (DEPLOY / f"systemd/perfit-{name}.service").read_text()
        )


def test_both_ways_to_run_a_fleet_have_enrolment_under_one_name() -> None:
    settings = [tomllib.loads(file.read_text()) for file in sorted((DEPLOY / "systemd").glob("*.toml"))]
    named = {values["public_enrol_address"] for values in settings}
    assert named == {values["authority_address"] for values in settings if "authority_address" in values}
    assert len(named) == 1
    assert f"PUBLIC_ENROL_ADDRESS={named.pop()}\n" in (KUBERNETES / "kustomization.yaml").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        text = unit.read_text()
        assert "/opt/perfit/bin/perfit-cloud serve" in text
        copy = tmp_path / unit.name
        copy.write_text(text.replace("/opt/perfit/bin/perfit-cloud", "/bin/true"))
        assert ran("systemd-analyze", "verify", copy) == ""


@needs_promtool
def test_alerts_fire_when_they_should_and_not_else() -> None:
    assert "SUCCESS" in ran("promtool", "check", "rules", DEPLOY / "alerts.yml")
    assert "SUCCESS" in ran("promtool", "test", "rules", DEPLOY / "alerts.test.yml")


def test_certificates_that_are_renewed_in_time_are_no_alarm() -> None:
    """It was under 40 days, where a replica's certificate begins with 7."""
    rules = [
        rule
        for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    (expression,) = [rule["expr"] for rule in rules if rule["alert"] == "PerfitServerCertificateEnds"]
    days = float(expression.rpartition("<")[2])
    lives = [server_authority._OWN_LIFE.days, server_authority._FLEET_LIFE.days]
    assert 1 < days < min(lives) / 2, "the next one is taken at half of a life"


@needs_haproxy
def test_haproxy_reads_its_file() -> None:
    assert "WARNING" not in ran("haproxy", "-c", "-f", HAPROXY_FILE, **user_and_group())


@needs_haproxy
def test_haproxy_gives_up_root() -> None:
    """Workers went on as root, which only the ports need."""
    port, enrol = free_port(), free_port()
    environment = environment_of(devices=port, enrol=enrol, enrolment=("127.0.0.1:1", 1), replicas=[])
    wanted = pwd.getpwnam(user_and_group().get("PERFIT_USER", "haproxy"))
    with haproxy(environment=environment, ports=[port, enrol]):
        (master,) = [each for each in psutil.Process().children() if each.name() == "haproxy"]
        (worker,) = master.children()
        wait_for(lambda: set(worker.uids()) == {wanted.pw_uid})
        assert 0 not in worker.gids() or wanted.pw_gid == 0


def test_envoy_reads_its_file() -> None:
    assert "OK" in ran(envoy(), "--mode", "validate", "-c", ENVOY_FILE)


def test_the_container_installs_what_the_tests_ran_with() -> None:
    """By hash; `make lock` writes the list anew when constraints.txt changes."""

    def versions(text: str) -> dict[str, str]:
        found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", text, re.M)
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}

    lines = (DEPLOY / "requirements.txt").read_text()
    locked, tested = versions(lines), versions((ROOT / "constraints.txt").read_text())
    assert len(locked) > 90 and lines.count("--hash=sha256:") >= len(locked)
    assert {name: version for name, version in locked.items() if tested.get(name) != version} == {}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("cloud", "fleet", "signing"):  # the manifests have a database, and sign artefacts
        wanted = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in extras[extra]} - {"torch"}
        assert wanted <= locked.keys(), extra
    # Torch comes alone; its build for CUDA brings NVIDIA's libraries besides.
    named = [
        re.split(r"[^A-Za-z0-9._-]", line)[0] for line in requires("torch") or [] if "extra ==" not in line
    ]
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in named}
    assert {name for name in wanted if not name.startswith(("nvidia-", "cuda-", "triton"))} <= locked.keys()


def test_the_container_takes_nothing_without_a_hash_but_torch() -> None:
    """An empty index took PyPI's build of torch for CUDA, and torch came first, with unhashed packages."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Containerfile").read_text())
    assert "\nARG TORCH_INDEX=https://download.pytorch.org/whl/cpu\nARG TORCH_DEPS=--no-deps\n" in text
    installs = re.findall(r"pip install (.*?)(?: &&|\n)", text)
    *listed, torch, ours = installs
    assert len(listed) == 2
    for words in listed:
        assert "--require-hashes --no-deps" in words
    assert "torch==" in torch and '${TORCH_DEPS} --index-url "$TORCH_INDEX"' in torch
    for words in (listed[-1], ours):  # or pip fetches what builds them
        assert "--no-build-isolation" in words


def test_the_container_is_built_of_what_it_copies_alone() -> None:
    """Without a list a build sent .git, environments of gigabytes, and runs along."""
    copied = {
        source
        for words in re.findall(r"^COPY (?!--from)(.*) \S+$", (DEPLOY / "Containerfile").read_text(), re.M)
        for source in words.split()
    }
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


def test_the_container_needs_neither_root_nor_a_shell() -> None:
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    runtime = lines[max(n for n, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER 10001" in runtime
    for word in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
        assert any(re.match(rf"{word}.*\[\"", line) for line in runtime), f"{word} in exec form: no shell"
    assert any("--require-hashes" in line for line in lines)
