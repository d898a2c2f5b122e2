"""The names of the small files that travel with the disks: what it takes to define the VM again.

They lie beside the disks in every backup, and come back with the plan of a restore.
"""

from __future__ import annotations

#: OpenNebula's document of the VM; in every backup
VM_XML = "vm.xml"
#: libvirt's definition of the domain; in every backup that was made here
DOMAIN_XML = "domain.xml"
#: UEFI variables, where the domain has them
NVRAM = "nvram.fd"
#: the state of the emulated TPM, where the domain has one
TPM = "tpm.tar"
