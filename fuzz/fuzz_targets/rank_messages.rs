//! What comes on a connection of rank 0: an opening and messages. And SLURM's lists of hosts.

#![no_main]

use ddpm_cuda::distributed::message::{Call, Decoder, Hello, LONGEST_TOKEN, Message, Opening, head, opening};
use ddpm_cuda::distributed::{Fact, Launcher, Stop, Who, World};
use ddpm_cuda_fuzz::{Seeds, assert_sentence, messages, offer};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    let whole = decoded(bytes, bytes.len().max(1));
    assert_eq!(whole, decoded(bytes, 1 + usize::from(bytes.first().copied().unwrap_or(0)) % 13));
    let (opened, all, _) = whole;
    assert!(opened.is_none_or(|opened| opened.token.len() <= LONGEST_TOKEN));
    for (message, body) in all {
        let mut again = Decoder::default();
        again.push(&head(&message, body.len()));
        again.push(&body);
        assert_eq!(again.message().expect("what was read can be written"), Some((message, body)));
    }
    hosts(&String::from_utf8_lossy(bytes));
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { messages(data, size, max_size, seed) });

/// What comes in pieces of so many bytes, and whether it ends with an error.
fn decoded(bytes: &[u8], piece: usize) -> (Option<Opening>, Vec<(Message, Vec<u8>)>, bool) {
    let (mut decoder, mut opened, mut all) = (Decoder::default(), None, Vec::new());
    for piece in bytes.chunks(piece) {
        decoder.push(piece);
        assert!(decoder.waiting() <= bytes.len());
        if opened.is_none() {
            match decoder.opening() {
                Ok(said) => opened = said,
                Err(error) => {
                    assert_sentence(&error);
                    return (opened, all, true);
                }
            }
        }
        while opened.is_some() {
            match decoder.message() {
                Ok(None) => break,
                Ok(Some(message)) => all.push(message),
                Err(error) => {
                    assert_sentence(&error);
                    return (opened, all, true);
                }
            }
        }
    }
    (opened, all, false)
}

fn hosts(list: &str) {
    let get = |name: &str| match name {
        "SLURM_STEP_NODELIST" => Some(list.to_string()),
        "MASTER_ADDR" | "MASTER_PORT" | "DDPM_PORT" => None,
        "SLURM_STEP_NUM_TASKS" => Some("8".into()),
        _ => Some("0".into()),
    };
    match World::from_variables(Some(Launcher::Slurm), &get) {
        Err(error) => assert_sentence(&error),
        Ok(world) => {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            assert!(!world.address.is_empty() && world.address.chars().all(plain), "{:?}", world.address);
        }
    }
}

fn seeds() -> Seeds {
    let who = |rank: usize| Who { rank, local_rank: 0, host: "a".into(), process: 7, device: "CPU".into() };
    let facts = vec![Fact::new("version", "1"), Fact::new("setting steps", 7)];
    let hello = Message::Hello(Hello { who: who(1), size: 2, local_size: None, facts });
    let call = || Call { number: 3, name: "gather of m".into() };
    let all = [
        Message::Refused { why: "because".into() },
        Message::Welcome { ranks: vec![who(0), who(1)] },
        Message::Alive { step: 4_000_000_000 },
        Message::Working { rank: 1, what: "saving".into(), millis: 5 },
        Message::Ask { code: 130, why: "Ctrl-C".into() },
        Message::Where,
        Message::At { step: 3 },
        Message::Stop(Stop { after: 3, code: 130, why: "Ctrl-C".into(), rank: 1 }),
        Message::Failed { rank: 1, text: "out of memory".into() },
        Message::Leave,
        Message::Goodbye,
    ];
    let joined = [opening("secret"), head(&hello, 0)].concat();
    let with_bodies = [
        joined.clone(),
        head(&Message::Part(call()), 5),
        b"bytes".to_vec(),
        head(&Message::Answer(call()), 0),
        head(&Message::Leave, 0),
    ];
    let others = all.iter().map(|message| head(message, 0)).collect::<Vec<_>>().concat();
    let inputs = vec![
        joined,
        with_bodies.concat(),
        [opening(""), others].concat(),
        b"gnode[10,20-25]".to_vec(),
        b"rack[0-3]node[08-15],login1".to_vec(),
    ];
    let words: [&[u8]; 8] =
        [b"ddpmrank", b"\"is\":", b"\"rank\":", b"null", b"18446744073709551615", b"-1", b"[[", b"]"];
    Seeds { inputs, words: words.map(<[u8]>::to_vec).to_vec() }
}
