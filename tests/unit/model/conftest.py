"""A domain as libvirt prints it, and the judges: OpenNebula's and libvirt's own schemas."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from lxml import etree

from oned_backup import xmldoc
from oned_backup.model.datastore import Datastore, new_datastore
from oned_backup.model.host import Host, new_host
from oned_backup.model.vm import DomainState, Vm, new_vm

_OPENNEBULA = Path(__file__).parents[3] / "share" / "schema" / "opennebula"
_NAMESPACE = "http://opennebula.org/XMLSchema"
_LIBVIRT = Path("/usr/share/libvirt/schemas/domain.rng")

DOMAIN = """
<domain type='kvm'>
  <name>web 1</name>
  <uuid>0f8cf0ae-0f3f-4b62-a2f2-8c6a2a6d2f6a</uuid>
  <genid>43dc0cf8-809b-4adf-9bea-a9abb5f3d90e</genid>
  <metadata><x:os xmlns:x="http://libosinfo.org/xmlns/libvirt/domain/1.0" id="debian"/></metadata>
  <memory unit='MiB'>2048</memory>
  <currentMemory unit='MiB'>1024</currentMemory>
  <memoryBacking><hugepages/></memoryBacking>
  <vcpu placement='static' cpuset='0-3'>2</vcpu>
  <iothreads>1</iothreads>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'>/var/lib/libvirt/qemu/nvram/web.fd</nvram>
    <boot dev='hd'/>
  </os>
  <features><acpi/><apic/><smm state='on'/>
    <hyperv mode='custom'><relaxed state='on'/><spinlocks state='on' retries='8191'/></hyperv></features>
  <cpu mode='custom' match='exact' check='partial'><model fallback='allow'>Skylake-Client</model>
    <topology sockets='1' dies='1' cores='2' threads='1'/><feature policy='require' name='vmx'/></cpu>
  <clock offset='utc'><timer name='rtc' tickpolicy='catchup'/><timer name='hpet' present='no'/></clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>coredump-destroy</on_crash>
  <pm><suspend-to-mem enabled='no'/><suspend-to-disk enabled='no'/></pm>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap' iothread='1'/>
      <source file='/srv/vm/web 1.qcow2'/>
      <backingStore type='file'><format type='qcow2'/><source file='/srv/base.qcow2'/></backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>WEB-1</serial>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/>
      <source dev='/dev/vg/data'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='/srv/iso/debian.iso'/>
      <target dev='sda' bus='sata'/>
      <readonly/>
      <address type='drive' controller='0' bus='0' target='0' unit='0'/>
    </disk>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='pci' index='1' model='pcie-root-port'>
      <model name='pcie-root-port'/><target chassis='1' port='0x8'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x01' function='0x0' multifunction='on'/>
    </controller>
    <controller type='sata' index='0'/>
    <controller type='virtio-serial' index='0'/>
    <interface type='bridge'>
      <mac address='52:54:00:12:34:56'/>
      <source bridge='br0'/>
      <target dev='vnet7'/>
      <model type='virtio'/>
      <filterref filter='clean-traffic'><parameter name='IP' value='10.0.0.7'/></filterref>
    </interface>
    <serial type='pty'><target type='isa-serial' port='0'><model name='isa-serial'/></target></serial>
    <console type='pty'><target type='serial' port='0'/></console>
    <channel type='unix'>
      <source mode='bind' path='/var/lib/libvirt/qemu/f16x86_64.agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <input type='tablet' bus='usb'/>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <graphics type='vnc' port='5901' autoport='no' listen='127.0.0.1' passwd='secret'>
      <listen type='address' address='127.0.0.1'/></graphics>
    <video><model type='virtio' heads='1' primary='yes'><acceleration accel3d='yes'/></model></video>
    <watchdog model='i6300esb' action='reset'/>
    <memballoon model='virtio'><stats period='5'/></memballoon>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>
    </hostdev>
    <filesystem type='mount'><source dir='/etc'/><target dir='share'/></filesystem>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'/>
</domain>
"""


@cache
def _opennebula(name: str) -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(_OPENNEBULA / f"{name}.xsd"))


@cache
def _libvirt() -> etree.RelaxNG:
    return etree.RelaxNG(etree.parse(_LIBVIRT))


def _assert_opennebula(element: xmldoc.Element) -> None:
    qualified = xmldoc.copy(element)
    for child in qualified.iter():
        child.tag = f"{{{_NAMESPACE}}}{child.tag}"
    _opennebula(str(element.tag).lower()).assertValid(qualified)


def _assert_libvirt(element: xmldoc.Element) -> None:
    # through text: libxml2 checks a tree made by hand more loosely
    _libvirt().assertValid(etree.fromstring(xmldoc.serialize(element)))


@pytest.fixture(scope="session")
def assert_valid() -> Callable[[xmldoc.Element], None]:
    """Fails with the schema's message if a VM, IMAGE, DATASTORE or HOST document is not OpenNebula's."""
    return _assert_opennebula


@pytest.fixture(scope="session")
def assert_libvirt() -> Callable[[xmldoc.Element], None]:
    """Fails with the schema's message if a domain is not what libvirt accepts."""
    return _assert_libvirt


@pytest.fixture
def domain() -> xmldoc.Element:
    return xmldoc.parse(DOMAIN)


@pytest.fixture
def host() -> Host:
    return new_host(4, name="node 1")


@pytest.fixture
def datastore() -> Datastore:
    return new_datastore(100, name="nas", ds_mad="fs", parameters={"BASE_PATH": "/srv/backup"})


@pytest.fixture
def vm(domain: xmldoc.Element, host: Host) -> Vm:
    return new_vm(
        7,
        name="web 1",
        placement=host.placement,
        domain=domain,
        state=DomainState.RUNNING,
        capacity_bytes={"vda": 10 * 1024**3, "vdb": 1024**2 + 1},
        date=1_700_000_000,
    )
