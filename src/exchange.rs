//! What the ranks of a run give each other: bytes, and nothing is added on the way.
//!
//! A run on several devices has a rank for each. All of them make the same calls in the same order, and a call returns
//! when every rank has made it. Whoever receives terms of a sum adds them itself, in an order that knows no ranks
//! (`ops::tree_sum`). So no result depends on how the bytes travelled.
//!
//! A run of one rank exchanges nothing. Ranks that are threads of one process, each with a device of its own, meet in
//! its memory: everything that depends on the number of ranks can be tested with them, on any device.
//!
//! Deliberately absent: sums on the way, whose order would be the network's; messages from one rank to another.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// A rank's part in the exchange. Dropping it ends the rank: the others' calls fail from then on.
pub struct Exchange {
    rank: usize,
    size: usize,
    way: Way,
}

enum Way {
    /// There is no other rank.
    Alone,
    /// The ranks are threads of this process.
    Threads(Arc<Meeting>),
}

impl Exchange {
    /// That of a run of one rank.
    pub fn alone() -> Self {
        Exchange { rank: 0, size: 1, way: Way::Alone }
    }

    /// Those of `size` ranks, each for a thread of its own.
    pub fn threads(size: usize) -> Vec<Self> {
        let given = (0..size).map(|_| None).collect();
        let meeting = Meeting { state: Mutex::new(State { given, taken: 0, ended: None }), changed: Condvar::new() };
        let meeting = Arc::new(meeting);
        (0..size).map(|rank| Exchange { rank, size, way: Way::Threads(meeting.clone()) }).collect()
    }

    /// This rank's number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// True for rank 0, which writes the run's files and speaks for all.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Why what is exchanged has to pass the host, so that it cannot be part of a CUDA graph; `None` if it has not.
    pub fn passes_the_host(&self) -> Option<&'static str> {
        match self.way {
            Way::Alone => None,
            Way::Threads(_) => Some("the ranks of the run are threads, which exchange through the host's memory"),
        }
    }

    /// What each rank gives, from host to host. They may give different numbers of `T`.
    ///
    /// # Errors
    /// A rank that has ended, or that makes another call; likewise for every function here.
    pub fn gather<T: Pod>(&self, own: &[T]) -> Result<Vec<Vec<T>>> {
        match &self.way {
            Way::Alone => Ok(vec![own.to_vec()]),
            Way::Threads(meeting) => {
                let all = meeting.meet(self.rank, "gather", None, bytemuck::cast_slice(own))?;
                Ok(all.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect())
            }
        }
    }

    /// Whether one of the ranks says so.
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn any(&self, own: bool) -> Result<bool> {
        Ok(self.gather(&[u8::from(own)])?.concat().contains(&1))
    }

    /// The text of each rank.
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn texts(&self, own: &str) -> Result<Vec<String>> {
        let texts = self.gather(own.as_bytes())?;
        Ok(texts.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect())
    }

    /// Sends shard s of `from` to rank s, and puts what comes from rank s into shard s of `to`. Both have as many equal
    /// shards as there are ranks, f32. Panics in a run of one rank, which has nothing to send.
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn all_to_all(&self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        let shard = self.shard(from);
        assert_eq!(shard, self.shard(to), "all_to_all: {from:?} to {to:?}");
        match &self.way {
            Way::Alone => panic!("all_to_all in a run of one rank"),
            Way::Threads(meeting) => {
                let all = meeting.meet(self.rank, "all_to_all", Some(shard), bytemuck::cast_slice(&from.host()?))?;
                let own = |bytes: &Arc<[u8]>| bytes[4 * self.rank * shard..][..4 * shard].to_vec();
                to.write(&bytemuck::pod_collect_to_vec::<u8, f32>(&all.iter().flat_map(own).collect::<Vec<u8>>()))
            }
        }
    }

    /// Gives every rank all shards of `x`, of which each has its own at its place. As many equal ones as there are
    /// ranks, f32.
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn all_gather(&self, x: &mut Tensor) -> Result<()> {
        let shard = self.shard(x);
        match &self.way {
            Way::Alone => Ok(()),
            Way::Threads(meeting) => {
                let own = x.host()?[self.rank * shard..][..shard].to_vec();
                let all = meeting.meet(self.rank, "all_gather", Some(shard), bytemuck::cast_slice(&own))?;
                let all: Vec<u8> = all.iter().flat_map(|bytes| bytes.iter().copied()).collect();
                x.write(&bytemuck::pod_collect_to_vec::<u8, f32>(&all))
            }
        }
    }

    /// Elements of a shard.
    fn shard(&self, x: &Tensor) -> usize {
        let len = x.shape().len();
        assert!(x.dtype() == DType::F32 && len.is_multiple_of(self.size), "{x:?} in {} shards", self.size);
        len / self.size
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Way::Threads(meeting) = &self.way {
            meeting.end(self.rank);
        }
    }
}

/// Where the threads of a process meet.
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What each rank has given in the call under way.
    given: Vec<Option<Given>>,
    /// Ranks that have taken what all have given.
    taken: usize,
    /// The first rank that has ended.
    ended: Option<usize>,
}

struct Given {
    call: &'static str,
    /// Elements of a shard, where they must be the same.
    shard: Option<usize>,
    bytes: Arc<[u8]>,
}

impl Meeting {
    /// Gives `bytes` in a call, waits for all ranks, and returns what each has given.
    fn meet(&self, rank: usize, call: &'static str, shard: Option<usize>, bytes: &[u8]) -> Result<Vec<Arc<[u8]>>> {
        let mut state = self.lock();
        // The others may still have to take what was given last.
        while state.given[rank].is_some() {
            state = self.wait(state, rank)?;
        }
        state.given[rank] = Some(Given { call, shard, bytes: bytes.into() });
        self.changed.notify_all();
        while state.given.iter().any(Option::is_none) {
            state = self.wait(state, rank)?;
        }
        let all: Vec<&Given> = state.given.iter().flatten().collect();
        let other = all.iter().position(|given| (given.call, given.shard) != (all[0].call, all[0].shard));
        let taken = match other {
            None => Ok(all.iter().map(|given| given.bytes.clone()).collect()),
            Some(other) => {
                let said = [0, other].map(|rank| format!("rank {rank} {}", all[rank].describe()));
                Err(Error::Failed(format!("the ranks of a run make the same calls, but {}", said.join(" and "))))
            }
        };
        state.taken += 1;
        if state.taken == state.given.len() {
            state.given.iter_mut().for_each(|given| *given = None);
            state.taken = 0;
            self.changed.notify_all();
        }
        taken
    }

    /// Waits for a change.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, rank: usize) -> Result<MutexGuard<'a, State>> {
        match state.ended {
            Some(ended) => {
                let what = format!("rank {ended} has ended, without which rank {rank} cannot go on");
                Err(Error::Failed(what))
            }
            None => Ok(self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)),
        }
    }

    fn end(&self, rank: usize) {
        self.lock().ended.get_or_insert(rank);
        self.changed.notify_all();
    }

    /// Nothing panics between two changes that belong together, so a poisoned lock is safe to use.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Given {
    fn describe(&self) -> String {
        match self.shard {
            None => format!("calls {}", self.call),
            Some(shard) => format!("calls {} of shards of {shard} elements", self.call),
        }
    }
}
