//! Reads the images of the next steps before they are asked for, where they are in a file and not in memory.
//!
//! A thread of its own asks the system for the images of a step all at once, reads them and compares them with their
//! hashes, so that a step finds them in the system's page cache and knows that they are whole. A step whose images are
//! not there yet waits, and how long is measured.
//!
//! Deliberately absent: a cache. The system's is one, gives back what is not used, and is shared by all processes that
//! map the file.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Instant;

use crate::data::{Dataset, Order};
use crate::error::{Error, Result};

/// Bytes of images that are read ahead.
const AHEAD: usize = 64 << 20;
/// Steps whose images are, at most.
const MOST_STEPS: usize = 16;

/// How often and how long steps waited for their images.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Waits {
    /// Steps that waited.
    pub steps: u32,
    /// How long, all of them together.
    pub seconds: f64,
}

/// The images of the next steps, being read.
pub(super) struct Ahead {
    order: Order,
    worker: Option<Worker>,
    /// Places in the order of what is being read or read, the next step's first.
    asked: VecDeque<Range<u64>>,
    waits: Waits,
}

/// The thread that reads. It ends when nobody can ask it any more.
struct Worker {
    ask: Sender<Vec<u32>>,
    read: Receiver<Result<()>>,
}

impl Ahead {
    /// Of `data`, in the order of which `order` is a copy of its own. For images in memory it does nothing.
    pub fn new(data: &Dataset, order: Order) -> Self {
        let worker = data.is_mapped().then(|| {
            let (ask, asked) = channel::<Vec<u32>>();
            let (done, read) = channel();
            let data = data.clone();
            std::thread::spawn(move || {
                for rows in asked {
                    if done.send(data.check(&rows)).is_err() {
                        break;
                    }
                }
            });
            Worker { ask, read }
        });
        Ahead { order, worker, asked: VecDeque::new(), waits: Waits::default() }
    }

    /// True if images are read ahead.
    pub fn is_reading(&self) -> bool {
        self.worker.is_some()
    }

    /// What steps have waited since this was last asked.
    pub fn take_waits(&mut self) -> Waits {
        std::mem::take(&mut self.waits)
    }

    /// Waits until the images at `places` of the order of `data`, those of a step, are read, and has those of the next
    /// steps read.
    ///
    /// # Errors
    /// `Error::File` for an image that is not as it was written.
    pub fn begin(&mut self, data: &Dataset, places: Range<u64>) -> Result<()> {
        let Ahead { order, worker: Some(worker), asked, waits } = self else { return Ok(()) };
        let ended = || Error::Failed("the thread that reads images has ended".into());
        let mut ask = |asked: &mut VecDeque<Range<u64>>, places: Range<u64>| {
            let rows = data.rows(&order.range(places.clone()), false).rows;
            asked.push_back(places);
            worker.ask.send(rows).map_err(|_| ended())
        };
        // After a resume, or if a step is done again.
        while asked.front().is_some_and(|next| *next != places) {
            asked.pop_front();
            worker.read.recv().map_err(|_| ended())??;
        }
        if asked.is_empty() {
            ask(asked, places.clone())?;
        }
        match worker.read.try_recv() {
            Ok(read) => read?,
            Err(TryRecvError::Disconnected) => return Err(ended()),
            Err(TryRecvError::Empty) => {
                let started = Instant::now();
                worker.read.recv().map_err(|_| ended())??;
                waits.steps += 1;
                waits.seconds += started.elapsed().as_secs_f64();
            }
        }
        asked.pop_front();
        let (images, next) = (places.end - places.start, asked.back().map_or(places.end, |last| last.end));
        let steps = (AHEAD / (images as usize * data.extent().len()).max(1)).clamp(1, MOST_STEPS);
        for k in 0..(steps.saturating_sub(asked.len())) as u64 {
            let first = next + k * images;
            ask(asked, first..first + images)?;
        }
        Ok(())
    }
}
