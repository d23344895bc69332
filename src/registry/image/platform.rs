//! Platforms: what an image is for, and whether that runs here.

use std::fmt;

use serde::Deserialize;

use crate::registry::json;

/// Operating system and architecture, in Go's words as OCI uses them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Platform {
    /// `linux`.
    #[serde(default, deserialize_with = "json::loose")]
    pub os: String,
    /// `amd64`, `arm64`, ...
    #[serde(default, deserialize_with = "json::loose")]
    pub architecture: String,
    /// `v7`, `v8`, ...; empty if not stated.
    #[serde(default, deserialize_with = "json::loose")]
    pub variant: String,
}

impl Platform {
    /// The machine Lazuli was built for.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "x86" => ("386", ""),
            "aarch64" => ("arm64", "v8"),
            "arm" => ("arm", "v7"),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", ""),
            "powerpc64" => ("ppc64", ""),
            "loongarch64" => ("loong64", ""),
            other => (other, ""),
        };
        Platform {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        }
    }

    /// Whether an image for `image` runs on this platform: `None` if not, else a rank among those that do.
    pub fn runs(&self, image: &Platform) -> Option<u32> {
        if !image.os.eq_ignore_ascii_case(&self.os) {
            return None;
        }
        let (own, own_variant) = normal(self);
        let (other, other_variant) = normal(image);
        if own != other {
            return None;
        }
        (other_variant <= own_variant).then_some(1 + other_variant)
    }
}

/// Architecture and variant under their usual names; the variant as a number, its default filled in.
fn normal(platform: &Platform) -> (String, u32) {
    let architecture = platform.architecture.to_ascii_lowercase();
    let architecture = match architecture.as_str() {
        "x86_64" | "x86-64" => "amd64",
        "i386" | "i686" => "386",
        "aarch64" => "arm64",
        "armhf" | "armv7l" => "arm",
        other => other,
    };
    // containerd's defaults.
    let default = match architecture {
        "arm64" => 8,
        "arm" => 7,
        _ => 1,
    };
    let variant = platform.variant.trim_start_matches(['v', 'V']);
    // `v8.1` and the like need what only a newer processor has: the part after the dot counts as more.
    let number = match variant.split_once('.') {
        _ if variant.is_empty() => default,
        Some((major, _)) => major
            .parse::<u32>()
            .map_or(u32::MAX - 1, |major| major.saturating_add(1)),
        None => variant.parse().unwrap_or(u32::MAX - 1),
    };
    (architecture.to_owned(), number)
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        Platform {
            os: parts.next().unwrap(),
            architecture: parts.next().unwrap(),
            variant: parts.next().unwrap_or_default(),
        }
    }

    #[test]
    fn only_what_runs_here_is_taken() {
        for (host, image, runs) in [
            ("linux/amd64", "linux/amd64", true),
            ("linux/amd64", "linux/x86_64", true),
            ("linux/amd64", "linux/amd64/v3", false),
            ("linux/amd64", "linux/amd64/v1", true),
            ("linux/amd64", "linux/386", false),
            ("linux/amd64", "windows/amd64", false),
            ("linux/amd64", "unknown/unknown", false),
            ("linux/arm64/v8", "linux/arm64", true),
            ("linux/arm64/v8", "linux/arm64/v8", true),
            ("linux/arm64/v8", "linux/arm64/v8.2", false),
            ("linux/arm64/v8", "linux/arm/v7", false),
            ("linux/arm/v7", "linux/arm/v6", true),
            ("linux/arm/v6", "linux/arm/v7", false),
            ("linux/arm/v7", "linux/arm/vX", false),
        ] {
            assert_eq!(
                platform(host).runs(&platform(image)).is_some(),
                runs,
                "{image} on {host}"
            );
        }
        let arm = platform("linux/arm/v7");
        assert!(arm.runs(&platform("linux/arm/v7")) > arm.runs(&platform("linux/arm/v6")));
        assert_eq!(Platform::host().os, "linux");
    }
}
