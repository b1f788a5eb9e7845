"""A family's own certificate authority: one folder, the X.509 certificates it issued and what it revoked.

    ca.pem, ca.key     the authority; its key is encrypted with a passphrase
    issued/            every certificate ever issued, `<identity>-<serial>.pem`
    crl.pem            the revoked ones (RFC 5280); servers and devices may have a copy

Needs the extra `pki` (cryptography). Keys are ECDSA on P-256: every TLS stack of a small device speaks it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kinflow.errors import SettingsError
from kinflow.files import write_whole
from kinflow.identity import Identity
from kinflow.tls import CA, CERT, CRL, KEY

CA_KEY = "ca.key"
ISSUED = "issued"
CA_DAYS = 3650
ISSUED_DAYS = 730
# A board without a clock may be behind: what is issued now must be valid for it too.
BACKDATED = dt.timedelta(days=1)


@dataclass(frozen=True)
class Issued:
    """One certificate that the authority has issued."""

    identity: Identity
    serial: int
    expires: dt.datetime
    revoked: bool

    @property
    def state(self) -> str:
        if self.revoked:
            return "revoked"
        return "expired" if self.expires < _now() else "valid"


class Authority:
    """The authority in `folder`. Its key is needed, and decrypted, only to issue and to revoke."""

    def __init__(self, folder: Path) -> None:
        """Raises SettingsError when there is none."""
        self.folder = folder
        try:
            self._certificate = x509.load_pem_x509_certificate((folder / CA).read_bytes())
        except (OSError, ValueError) as exc:
            raise SettingsError(f"{folder} holds no authority: make one with kinflow pki init {folder}") from exc

    @classmethod
    def create(cls, folder: Path, name: str, passphrase: str) -> Authority:
        """A new one. Raises SettingsError when the folder holds one already."""
        if (folder / CA).exists() or (folder / CA_KEY).exists():
            raise SettingsError(f"{folder} holds an authority already: name another folder")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        builder = _builder(subject, subject, key.public_key(), key.public_key(), CA_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        certificate = builder.sign(key, hashes.SHA256())
        write_whole(folder / CA_KEY, _private(key, passphrase), secret=True)
        write_whole(folder / CA, certificate.public_bytes(serialization.Encoding.PEM))
        authority = cls(folder)
        authority._write_crl(key, [])
        return authority

    def issue(self, identity: Identity, out: Path, passphrase: str, *, days: int, renew: bool = False) -> Issued:
        """A new key and certificate in `out`, with ca.pem and crl.pem: all that its holder needs.

        Raises SettingsError when `out` holds a key already, or when the identity has a valid certificate and
        `renew` is false: two holders of one identity could read each other's replies.
        """
        if (out / KEY).exists():
            raise SettingsError(f"{out} holds a key already: name another folder")
        valid = [issued for issued in self.issued() if issued.identity == identity and issued.state == "valid"]
        if valid and not renew:
            raise SettingsError(f"{identity} has a certificate: revoke it, or renew it with --renew")
        signing = self._key(passphrase)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(identity))])
        builder = _builder(subject, self._certificate.subject, key.public_key(), signing.public_key(), days)
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if identity.is_server:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        certificate = builder.sign(signing, hashes.SHA256())
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        # Recorded first: what is not in the record cannot be revoked.
        write_whole(self.folder / ISSUED / f"{identity}-{certificate.serial_number:x}.pem", pem)
        write_whole(out / KEY, _private(key, ""), secret=True)
        write_whole(out / CERT, pem)
        for name in (CA, CRL):
            write_whole(out / name, (self.folder / name).read_bytes())
        return Issued(identity, certificate.serial_number, certificate.not_valid_after_utc, revoked=False)

    def revoke(self, identity: Identity, passphrase: str) -> list[Issued]:
        """Revoke all valid certificates of `identity`: rewrites crl.pem. Raises SettingsError when there is none."""
        valid = [issued for issued in self.issued() if issued.identity == identity and issued.state == "valid"]
        if not valid:
            raise SettingsError(f"{identity} has no valid certificate: see kinflow pki list")
        now = _now()
        revoked = list(self._crl())
        for issued in valid:
            revoked.append(x509.RevokedCertificateBuilder().serial_number(issued.serial).revocation_date(now).build())
        self._write_crl(self._key(passphrase), revoked)
        return valid

    def check_holder(self, folder: Path) -> None:
        """Raises SettingsError when `folder` is not one whose holder trusts this authority."""
        try:
            theirs = (folder / CA).read_bytes()
        except OSError as exc:
            raise SettingsError(f"{folder} is no TLS folder: {CA}: {exc.strerror}") from exc
        if theirs != (self.folder / CA).read_bytes():
            raise SettingsError(f"{folder} belongs to another authority: its {CA} is not that of {self.folder}")

    def tell(self, folder: Path) -> None:
        """Bring the list of what was revoked to a holder: whole, or not at all. Raises SettingsError."""
        try:
            write_whole(folder / CRL, (self.folder / CRL).read_bytes())
        except OSError as exc:
            raise SettingsError(f"{folder / CRL}: {exc.strerror}: copy {self.folder / CRL} there") from exc

    def issued(self) -> list[Issued]:
        """Everything that was issued, by identity, the newest last."""
        revoked = {entry.serial_number for entry in self._crl()}
        found = []
        for path in (self.folder / ISSUED).glob("*.pem"):
            try:
                certificate = x509.load_pem_x509_certificate(path.read_bytes())
                name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
            except (OSError, ValueError, IndexError) as exc:
                raise SettingsError(f"{path} is not a certificate that was issued here: {exc}") from exc
            serial = certificate.serial_number
            found.append(Issued(Identity.parse(str(name)), serial, certificate.not_valid_after_utc, serial in revoked))
        return sorted(found, key=lambda issued: (str(issued.identity), issued.expires))

    def _key(self, passphrase: str) -> ec.EllipticCurvePrivateKey:
        try:
            key = serialization.load_pem_private_key((self.folder / CA_KEY).read_bytes(), passphrase.encode())
        except (OSError, ValueError, TypeError) as exc:
            raise SettingsError(f"{self.folder / CA_KEY} cannot be opened: is the passphrase right?") from exc
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def _crl(self) -> Iterator[x509.RevokedCertificate]:
        try:
            crl = x509.load_pem_x509_crl((self.folder / CRL).read_bytes())
        except (OSError, ValueError) as exc:
            raise SettingsError(f"{self.folder / CRL}: {exc}: without it nobody knows what was revoked") from exc
        yield from crl

    def _write_crl(self, key: ec.EllipticCurvePrivateKey, revoked: list[x509.RevokedCertificate]) -> None:
        # Valid as long as the authority: where nobody renews it, an expired list would lock everybody out.
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(_now() - BACKDATED)
            .next_update(self._certificate.not_valid_after_utc)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(len(revoked) + 1), critical=False)
        )
        for entry in revoked:
            builder = builder.add_revoked_certificate(entry)
        crl = builder.sign(key, hashes.SHA256())
        write_whole(self.folder / CRL, crl.public_bytes(serialization.Encoding.PEM))


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_public: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey, passphrase: str) -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)
