import json, sys, time, torch
from companion import QuantScheme, load_pretrained, load_task, prepare_qat
from companion.arms import ARMS, Arm
from companion.study import trial
from companion.language import document_losses
from companion.sources import MINILM
torch.set_num_threads(1)
prep=ARMS["lsq"].prepare
arms=[ARMS["default"],Arm("q",prep,float_share=.25,distil=True),Arm("z",prep,float_share=0.0,distil=True),ARMS["lsq"]]
for name,mod,head,rate,fr,opt in (("cloze","docs-lm",None,1e-3,3e-4,{"block_size":128}),("summaries",MINILM,"retrieval",3e-4,1e-4,{})):
    task=load_task(name,**opt); model=load_pretrained(mod,head=head)
    print(name,"start",document_losses(model,task.validation).mean, "nearest",document_losses(prepare_qat(model,QuantScheme(2,None),"absmax"),task.validation).mean,flush=True)
    f=trial(model,task,None,Arm("float",finish=lambda m:m,float_share=1.0),steps=100,rate=fr,progress=False); print("float",f["validation_loss"],flush=True)
    for a in arms:
        t=time.time()
        r=trial(model,task,QuantScheme(2,None),a,steps=100,rate=rate,float_rate=fr,progress=False)
        print(name,a.name,a.float_share,a.distil,round(r["validation_loss"],4),r["validation"][0],"%.0fs"%(time.time()-t),flush=True)
