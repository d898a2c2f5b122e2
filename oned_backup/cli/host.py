"""The commands `oned-backup host`."""

from __future__ import annotations

from typing import Annotated

import typer

from oned_backup.cli import output
from oned_backup.cli.session import Json, Xml, client, key_values, print_document

app = typer.Typer(help="Hypervisors.", no_args_is_help=True)

_Ref = Annotated[str, typer.Argument(metavar="HOST", help="Id or name.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name for the host.")],
    uri: Annotated[str, typer.Option(help="Libvirt's URI.")] = "qemu:///system",
    vmm: Annotated[str, typer.Option(help="Hypervisor driver.")] = "kvm",
    tm: Annotated[str, typer.Option(help="Transfer manager driver of its VMs.")] = "qcow2",
    accept_host_key: Annotated[
        str, typer.Option(metavar="SHA256:…", help="Fingerprint of its SSH host key, as you compared it.")
    ] = "",
    *,
    json: Json = False,
) -> None:
    """Add a hypervisor; it must be reachable. One of another machine is qemu+ssh://root@NAME/system."""
    body = {"name": name, "uri": uri, "vmm": vmm, "tm": tm, "accept_host_key": accept_host_key}
    host = client().post("hosts", body)
    if json:
        output.print_json(host)
    else:
        output.say(f"host {host['id']} ({host['name']}) added")


@app.command("list")
def list_hosts(*, json: Json = False) -> None:
    """List the hypervisors."""
    hosts = client().get("hosts")
    if json:
        output.print_json(hosts)
        return
    output.print_table(
        ("ID>", "NAME", "STATE", "VMS>", "URI"),
        [(host["id"], host["name"], host["state"], len(host["vms"]), host["uri"]) for host in hosts],
        empty="No hosts. Add one: oned-backup host add NAME",
    )


@app.command()
def show(ref: _Ref, *, json: Json = False, xml: Xml = False) -> None:
    """Show a hypervisor and its domains, as they are now."""
    api = client()
    host_id = api.resolve("host", ref)
    if xml:
        print_document(api, "host", host_id)
        return
    host = api.get(f"hosts/{host_id}")
    if json:
        output.print_json(host)
        return
    names = ("id", "name", "uri", "state", "vmm", "tm", "error")
    output.print_fields([*((name, host[name]) for name in names), *host["paths"].items()])
    output.say("")
    output.print_table(
        ("DOMAIN", "STATE", "VM>", "UUID"),
        [(one["name"], one["state"], one["vm_id"], one["uuid"]) for one in host["domains"]],
        empty="No domains." if host["unreachable"] is None else host["unreachable"]["message"],
    )


@app.command()
def update(
    ref: _Ref,
    values: Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="REMOTE_DIR or SWTPM_DIR.")],
    *,
    json: Json = False,
) -> None:
    """Set a hypervisor's own directories. An empty value restores the default."""
    api = client()
    host = api.patch(f"hosts/{api.resolve('host', ref)}", {"values": key_values(values)})
    if json:
        output.print_json(host)
    else:
        output.print_fields(list(host["paths"].items()))


@app.command("accept-key")
def accept_key(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="user@host, of a host or a datastore.")],
    fingerprint: Annotated[str, typer.Argument(metavar="SHA256:…", help="As you compared it.")],
) -> None:
    """Accept a machine's SSH host key. The key that was known before is forgotten."""
    key = client().post("ssh/keys", {"target": target, "fingerprint": fingerprint})
    output.say(f"host key {key['fingerprint']} of {key['name']} is known")


@app.command()
def remove(
    ref: _Ref,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also forget its VMs; backups stay.")] = False,
) -> None:
    """Forget a hypervisor."""
    api = client()
    host_id = api.resolve("host", ref)
    api.delete(f"hosts/{host_id}{'?force=true' if force else ''}")
    output.say(f"host {host_id} removed")
