//! The hash functions that LUKS2 names, and PBKDF2 over them (RFC 8018 section 5.2).

use pbkdf2::pbkdf2_hmac;
use sha1::Sha1;
use sha2::{Sha256, Sha512};
use zeroize::Zeroizing;

/// A hash function that may stand in a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    Sha1,
    Sha256,
    Sha512,
}

impl Hash {
    /// By the name that stands in a header; `None` if this program does not have it.
    pub fn from_name(name: &str) -> Option<Hash> {
        match name {
            "sha1" => Some(Hash::Sha1),
            "sha256" => Some(Hash::Sha256),
            "sha512" => Some(Hash::Sha512),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha1",
            Hash::Sha256 => "sha256",
            Hash::Sha512 => "sha512",
        }
    }

    /// Length of its result in bytes.
    pub fn size(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha256 => 32,
            Hash::Sha512 => 64,
        }
    }

    /// The hash of the parts, one after the other; wiped on drop, because parts may be secret.
    pub(super) fn of(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        fn run<D: sha2::Digest>(parts: &[&[u8]]) -> Vec<u8> {
            let mut state = D::new();
            parts.iter().for_each(|part| state.update(part));
            state.finalize().to_vec()
        }
        Zeroizing::new(match self {
            Hash::Sha1 => run::<Sha1>(parts),
            Hash::Sha256 => run::<Sha256>(parts),
            Hash::Sha512 => run::<Sha512>(parts),
        })
    }

    /// PBKDF2 with HMAC over this hash; fills `out`.
    pub(super) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Hash::Sha1 => pbkdf2_hmac::<Sha1>(password, salt, iterations, out),
            Hash::Sha256 => pbkdf2_hmac::<Sha256>(password, salt, iterations, out),
            Hash::Sha512 => pbkdf2_hmac::<Sha512>(password, salt, iterations, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn names_go_both_ways() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            assert_eq!(Hash::from_name(hash.name()), Some(hash));
            assert_eq!(hash.of(&[b"x"]).len(), hash.size());
        }
        assert_eq!(Hash::from_name("SHA256"), None);
        assert_eq!(Hash::from_name("whirlpool"), None);
    }

    /// FIPS 180-4 examples: the message `abc`.
    #[test]
    fn hashes_agree_with_the_standard() {
        assert_eq!(
            hex(&Hash::Sha1.of(&[b"a", b"bc"])),
            "a9993e364706816aba3e25717850c26c9cd0d89d"
        );
        assert_eq!(
            hex(&Hash::Sha256.of(&[b"ab", b"", b"c"])),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert!(hex(&Hash::Sha512.of(&[b"abc"])).starts_with("ddaf35a193617abacc417349ae204131"));
    }

    /// SHA-1: RFC 6070. SHA-256: RFC 7914 section 11.
    #[test]
    fn pbkdf2_agrees_with_the_rfcs() {
        let run = |hash: Hash, password: &[u8], salt: &[u8], iterations, len| {
            let mut out = vec![0; len];
            hash.pbkdf2(password, salt, iterations, &mut out);
            hex(&out)
        };
        assert_eq!(
            run(Hash::Sha1, b"password", b"salt", 4096, 20),
            "4b007901b765489abead49d926f721d065a429c1"
        );
        assert_eq!(
            run(
                Hash::Sha1,
                b"passwordPASSWORDpassword",
                b"saltSALTsaltSALTsaltSALTsaltSALTsalt",
                4096,
                25
            ),
            "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"
        );
        assert_eq!(
            run(Hash::Sha256, b"passwd", b"salt", 1, 64),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
             49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        );
    }
}
